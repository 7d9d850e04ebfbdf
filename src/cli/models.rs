//! `mneme models`: the short names, and which of them are on disk.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use mneme::hub::{Cache, ModelRef, Resolver, catalog};
use serde::Serialize;

/// List the models that have a short name, and where the downloaded ones are.
#[derive(Debug, Args)]
pub(crate) struct ModelsArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One line of the list.
#[derive(Serialize)]
struct Row {
    name: String,
    about: String,
    is_default: bool,
    /// Size of the download; unknown for a repository.
    size_bytes: Option<u64>,
    /// Where it is, when it is on disk.
    path: Option<PathBuf>,
}

/// Runs the command.
pub(crate) fn run(args: &ModelsArgs) -> anyhow::Result<()> {
    let rows = rows(&Resolver::new(Cache::from_env()?))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &rows)?;
        writeln!(out)?;
        return Ok(());
    }
    write_table(&mut out, &rows)?;
    Ok(())
}

fn rows(resolver: &Resolver) -> anyhow::Result<Vec<Row>> {
    let row = |name: &str, about: String, size_bytes| -> anyhow::Result<Row> {
        let path = resolver.cached(&ModelRef::parse(name)?)?.map(|model| model.path);
        Ok(Row { name: name.to_owned(), about, is_default: name == catalog::DEFAULT_MODEL, size_bytes, path })
    };
    let artifacts = catalog::artifacts().iter().map(|a| row(a.name, a.about.to_owned(), Some(a.size_bytes)));
    let repos = catalog::repo_names().iter().map(|(name, id)| row(name, format!("original weights of {id}"), None));
    let mut rows: Vec<Row> = artifacts.chain(repos).collect::<anyhow::Result<_>>()?;
    // A model that an older version of this program knew is still on disk, and still takes space.
    let gone = resolver.cache().list()?.into_iter().filter(|model| catalog::find(&model.name).is_none());
    rows.extend(gone.map(|model| Row {
        name: model.name,
        about: "no longer in the catalog".to_owned(),
        is_default: false,
        size_bytes: Some(model.size_bytes),
        path: Some(model.path),
    }));
    Ok(rows)
}

fn write_table(out: &mut dyn Write, rows: &[Row]) -> std::io::Result<()> {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    for row in rows {
        let size = row.size_bytes.map_or_else(|| "      -".to_owned(), |bytes| format!("{:>3} MiB", bytes >> 20));
        let place = row.path.as_ref().map_or_else(|| "not downloaded".to_owned(), |path| path.display().to_string());
        writeln!(out, "{:<width$}  {size}  {}\n{:<width$}           {place}", row.name, row.about, "")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_short_name() {
        let folder = tempfile::tempdir().unwrap();
        let rows = rows(&Resolver::new(Cache::at(folder.path()))).unwrap();
        let mut text = Vec::new();
        write_table(&mut text, &rows).unwrap();
        let text = String::from_utf8(text).unwrap();
        for name in catalog::names() {
            assert!(text.contains(name), "{text}");
        }
        assert_eq!(rows.iter().filter(|row| row.is_default).count(), 1);
        assert!(text.contains("not downloaded"));
    }
}
