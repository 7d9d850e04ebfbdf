//! The look of vLLM's benchmark tables, which scripts read line by line.

use std::io::{self, Write};

const WIDTH: usize = 50;

/// A title between `fill` characters.
pub(super) fn title(out: &mut dyn Write, title: &str, fill: char) -> io::Result<()> {
    let spaces = WIDTH.saturating_sub(title.chars().count());
    let left: String = std::iter::repeat_n(fill, spaces / 2).collect();
    let right: String = std::iter::repeat_n(fill, spaces - spaces / 2).collect();
    writeln!(out, "{left}{title}{right}")
}

/// A label and a count.
pub(super) fn count(out: &mut dyn Write, label: &str, value: usize) -> io::Result<()> {
    writeln!(out, "{label:<40} {value:<10}")
}

/// A label and a measured value.
pub(super) fn value(out: &mut dyn Write, label: &str, value: f64) -> io::Result<()> {
    writeln!(out, "{label:<40} {value:<10.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_wide_as_vllms() {
        let mut text = Vec::new();
        title(&mut text, " Serving Benchmark Result ", '=').unwrap();
        count(&mut text, "Successful requests:", 10).unwrap();
        value(&mut text, "Mean TTFT (ms):", 1.234).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "============ Serving Benchmark Result ============");
        assert_eq!(lines[1], "Successful requests:                     10        ");
        assert_eq!(lines[2], "Mean TTFT (ms):                          1.23      ");
    }
}
