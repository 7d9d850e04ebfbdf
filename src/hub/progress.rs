//! Owns how a long download or check is shown: a bar on a terminal, single lines elsewhere.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

/// What a download tells its viewer. One thing is under way at a time.
pub trait Progress {
    /// A new thing begins; `total_bytes` is 0 when its size is not known.
    fn start(&mut self, total_bytes: u64, label: &str);
    /// This many more bytes are done.
    fn advance(&mut self, num_bytes: u64);
    /// The thing ended, well or not.
    fn finish(&mut self);
    /// A line worth reading whether or not a bar is shown.
    fn message(&mut self, text: &str);
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn start(&mut self, _total_bytes: u64, _label: &str) {}
    fn advance(&mut self, _num_bytes: u64) {}
    fn finish(&mut self) {}
    fn message(&mut self, _text: &str) {}
}

/// The viewer for a command: bars when stderr is a terminal, one line per download otherwise. Stdout stays clean.
pub fn stderr_progress() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() { Box::new(Bar { bar: None }) } else { Box::new(Lines) }
}

struct Bar {
    bar: Option<ProgressBar>,
}

const TEMPLATE: &str = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} ({eta})";

impl Progress for Bar {
    fn start(&mut self, total_bytes: u64, label: &str) {
        self.finish();
        let bar = if total_bytes == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total_bytes) };
        if total_bytes > 0 {
            bar.set_style(ProgressStyle::with_template(TEMPLATE).expect("the template is a constant"));
        }
        bar.set_message(label.to_owned());
        self.bar = Some(bar);
    }

    fn advance(&mut self, num_bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(num_bytes);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn message(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => write_line(text),
        }
    }
}

struct Lines;

impl Progress for Lines {
    fn start(&mut self, total_bytes: u64, label: &str) {
        // Small files pass too quickly to be worth a line in a log.
        if total_bytes >= 1 << 20 {
            write_line(&format!("{label} ({} MiB)", total_bytes >> 20));
        }
    }
    fn advance(&mut self, _num_bytes: u64) {}
    fn finish(&mut self) {}
    fn message(&mut self, text: &str) {
        write_line(text);
    }
}

fn write_line(text: &str) {
    // A closed stderr must not stop a download.
    let _ = writeln!(std::io::stderr(), "{text}");
}
