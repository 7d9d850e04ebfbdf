//! Answers as text: aligned for a terminal, separated by tabs for a pipe.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;

/// Prints one kind of answer.
pub(super) type Printer = fn(&Value, &mut dyn Write) -> io::Result<()>;

/// Columns of a list.
const HEADS: [&str; 6] = ["NAME", "VERSION", "KIND", "STATE", "TOKENS", "BYTES"];

/// A list of cubes.
pub(super) fn list(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let rows: Vec<[String; 6]> = answer["data"].as_array().into_iter().flatten().map(row).collect();
    if io::stdout().is_terminal() {
        aligned(&rows, out)?
    } else {
        tabbed(&rows, out)?
    }
    if let Some(after) = answer["next_after"].as_str() {
        writeln!(io::stderr(), "There are more; go on with --after {after}")?;
    }
    Ok(())
}

fn row(cube: &Value) -> [String; 6] {
    let fields = [
        &cube["name"],
        &cube["version"],
        &cube["kind"],
        &cube["state"],
        &cube["binding"]["num_tokens"],
        &cube["bytes"],
    ];
    fields.map(shown)
}

fn tabbed(rows: &[[String; 6]], out: &mut dyn Write) -> io::Result<()> {
    rows.iter().try_for_each(|row| writeln!(out, "{}", row.join("\t")))
}

fn aligned(rows: &[[String; 6]], out: &mut dyn Write) -> io::Result<()> {
    let widths: Vec<usize> = (0..HEADS.len())
        .map(|column| rows.iter().map(|row| row[column].len()).fold(HEADS[column].len(), usize::max))
        .collect();
    for row in [HEADS.map(str::to_owned)].iter().chain(rows) {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// A fused adapter.
pub(super) fn fused(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let lost = answer["largest_loss"].as_f64().unwrap_or(0.0) * 100.0;
    writeln!(
        out,
        "{}: rank {}, at most {lost:.2} % of a module's update lost",
        shown(&answer["folder"]),
        answer["rank"]
    )
}

/// One cube, a line for each field that has a value.
pub(super) fn cube(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let separator = if io::stdout().is_terminal() { ": " } else { "\t" };
    for (name, value) in answer.as_object().into_iter().flatten() {
        if !value.is_null() && !matches!(name.as_str(), "object" | "restored_tokens" | "computed_tokens" | "reason") {
            writeln!(out, "{name}{separator}{}", shown(value))?;
        }
    }
    Ok(())
}

/// A cube that was made or grew.
pub(super) fn made(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let (restored, computed) = (shown(&answer["restored_tokens"]), shown(&answer["computed_tokens"]));
    writeln!(out, "{}\trestored {restored}, computed {computed} tokens", address(answer))
}

/// A cube whose header was changed.
pub(super) fn changed(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}\tpriority {}", address(answer), shown(&answer["priority"]))
}

/// A cube that is gone.
pub(super) fn deleted(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}\tdeleted", shown(&answer["name"]))
}

/// What became of a cube's blocks.
pub(super) fn verified(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let [whole, missing, damaged] = ["whole", "missing", "damaged"].map(|field| shown(&answer[field]));
    writeln!(out, "{}\t{whole} blocks whole, {missing} missing, {damaged} damaged", address(answer))
}

/// A cube in a file.
pub(super) fn exported(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let [name, file, bytes] = ["name", "file", "bytes"].map(|field| shown(&answer[field]));
    writeln!(out, "{name}\t{bytes} bytes in {file}")
}

/// A snapshot that was made.
pub(super) fn snapshot(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let num_cubes = answer["cubes"].as_array().map_or(0, Vec::len);
    let [id, scope, created_at] = ["id", "scope", "created_at"].map(|field| shown(&answer[field]));
    writeln!(out, "{id}\t{scope}\t{created_at}\t{num_cubes} cubes")
}

/// All snapshots.
pub(super) fn snapshots(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    answer["data"].as_array().into_iter().flatten().try_for_each(|each| snapshot(each, out))
}

/// What changed since a snapshot.
pub(super) fn differences(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    fields_of(answer, ["name", "then", "now", "change"], out)
}

/// What restoring a snapshot did.
pub(super) fn restorations(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    fields_of(answer, ["name", "restored_version", "version", "outcome"], out)
}

/// A snapshot that is gone.
pub(super) fn dropped(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}\tdeleted", shown(&answer["id"]))
}

fn fields_of(answer: &Value, fields: [&str; 4], out: &mut dyn Write) -> io::Result<()> {
    answer["data"]
        .as_array()
        .into_iter()
        .flatten()
        .try_for_each(|each| writeln!(out, "{}", fields.map(|field| shown(&each[field])).join("\t")))
}

fn address(answer: &Value) -> String {
    format!("{}@{}", shown(&answer["name"]), shown(&answer["version"]))
}

/// A value on one line: control characters of foreign texts must not reach a terminal.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.chars().any(char::is_control) => text.escape_debug().to_string(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn printed(printer: impl Fn(&mut dyn Write) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        printer(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lists_are_aligned_or_tabbed() {
        let cubes = [
            json!({ "name": "ana/a", "version": 1, "kind": "plaintext", "state": "generated", "bytes": 0 }),
            json!({ "name": "ana/longer", "version": 12, "kind": "activation", "state": "frozen", "bytes": 4096,
                    "binding": { "num_tokens": 17 } }),
        ];
        let rows: Vec<[String; 6]> = cubes.iter().map(row).collect();
        let tabs = printed(|out| tabbed(&rows, out));
        assert_eq!(tabs, "ana/a\t1\tplaintext\tgenerated\t-\t0\nana/longer\t12\tactivation\tfrozen\t17\t4096\n");
        let table = printed(|out| aligned(&rows, out));
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "NAME        VERSION  KIND        STATE      TOKENS  BYTES");
        assert_eq!(lines[1], "ana/a       1        plaintext   generated  -       0");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn what_others_wrote_does_not_steer_the_terminal() {
        let answer = json!({ "object": "memcube", "name": "ana/a", "text": "red \u{1b}[31m\nline", "ttl_s": null });
        assert_eq!(printed(|out| cube(&answer, out)), "name\tana/a\ntext\tred \\u{1b}[31m\\nline\n");
    }

    #[test]
    fn answers_are_one_line() {
        let answer = json!({ "name": "ana/a", "version": 2, "restored_tokens": 16, "computed_tokens": 4, "priority": 5,
                             "whole": 2, "missing": 0, "damaged": 1 });
        assert_eq!(printed(|out| made(&answer, out)), "ana/a@2\trestored 16, computed 4 tokens\n");
        assert_eq!(printed(|out| changed(&answer, out)), "ana/a@2\tpriority 5\n");
        assert_eq!(printed(|out| deleted(&answer, out)), "ana/a\tdeleted\n");
        let changed = json!({ "data": [{ "name": "ana/a", "then": 1, "now": null, "change": "gone" }] });
        assert_eq!(printed(|out| differences(&changed, out)), "ana/a\t1\t-\tgone\n");
        let made = json!({ "id": "x", "scope": "ana", "created_at": "now", "cubes": [{}, {}] });
        assert_eq!(printed(|out| snapshots(&json!({ "data": [made] }), out)), "x\tana\tnow\t2 cubes\n");
        assert_eq!(printed(|out| verified(&answer, out)), "ana/a@2\t2 blocks whole, 0 missing, 1 damaged\n");
    }
}
