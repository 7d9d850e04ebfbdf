//! What a typed line means.

/// The commands, for `/help`.
pub(super) const HELP: &str = "\
/system TEXT   set the instructions and begin anew; without TEXT, remove them
/clear         forget the conversation
/help          show this
/exit          end the program, as Ctrl-D does
//TEXT         say /TEXT";

/// One line of input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// Nothing to answer.
    Empty,
    /// Something to say to the model.
    Message(String),
    Exit,
    Clear,
    Help,
    /// New instructions; `None` removes them.
    System(Option<String>),
    /// A command that does not exist.
    Unknown(String),
}

impl Input {
    pub(super) fn parse(line: &str) -> Self {
        let line = line.trim();
        if line.is_empty() {
            return Input::Empty;
        }
        let Some(command) = line.strip_prefix('/') else { return Input::Message(line.to_owned()) };
        if command.starts_with('/') {
            return Input::Message(command.to_owned());
        }
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match (name, rest.is_empty()) {
            ("exit" | "quit" | "bye", true) => Input::Exit,
            ("clear", true) => Input::Clear,
            ("help" | "?", true) => Input::Help,
            ("system", is_empty) => Input::System((!is_empty).then(|| rest.to_owned())),
            _ => Input::Unknown(line.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart() {
        let message = |text: &str| Input::Message(text.to_owned());
        let unknown = |text: &str| Input::Unknown(text.to_owned());
        for (line, wanted) in [
            ("  \n", Input::Empty),
            (" hello \r\n", message("hello")),
            ("/exit\n", Input::Exit),
            ("/clear", Input::Clear),
            ("/help", Input::Help),
            ("/system  be brief ", Input::System(Some("be brief".into()))),
            ("/system", Input::System(None)),
            ("//etc/hosts is what?", message("/etc/hosts is what?")),
            ("/clear all", unknown("/clear all")),
            ("/sing", unknown("/sing")),
            ("what is /exit?", message("what is /exit?")),
        ] {
            assert_eq!(Input::parse(line), wanted, "{line:?}");
        }
    }
}
