//! What the tour looks like.

use std::io::{self, IsTerminal, Write};

/// The longest line.
const WIDTH: usize = 92;
const INDENT: &str = "   ";

/// Standard output, in colour where a person looks at it.
#[derive(Debug)]
pub(crate) struct Terminal {
    colours: bool,
}

#[derive(Debug, Clone, Copy)]
enum Style {
    Plain,
    Bold,
    Dim,
    Cyan,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        let is_wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { colours: is_wanted && io::stdout().is_terminal() }
    }

    /// The name of a step.
    pub(crate) fn title(&self, title: &str) -> io::Result<()> {
        println(&format!("\n{}", self.styled(Style::Bold, title)))
    }

    /// What was asked: the words of a command, of which none is broken up.
    pub(crate) fn command(&self, words: &[String]) -> io::Result<()> {
        let mut lines = vec!["$".to_owned()];
        for word in words {
            let line = lines.last_mut().expect("there is a first line");
            if INDENT.len() + line.len() + 1 + word.len() + " \\".len() > WIDTH {
                line.push_str(" \\");
                lines.push(format!("   {word}"));
            } else {
                line.push(' ');
                line.push_str(word);
            }
        }
        lines.iter().try_for_each(|line| self.line(Style::Cyan, line))
    }

    /// What was seen.
    pub(crate) fn saw(&self, text: &str) -> io::Result<()> {
        self.wrapped(Style::Plain, text)
    }

    /// Why it was so, or what follows.
    pub(crate) fn why(&self, text: &str) -> io::Result<()> {
        self.wrapped(Style::Dim, text)
    }

    fn wrapped(&self, style: Style, text: &str) -> io::Result<()> {
        let mut lines = vec![String::new()];
        for word in text.split(' ') {
            let line = lines.last_mut().expect("there is a first line");
            if INDENT.len() + line.len() + 1 + word.len() > WIDTH && !line.trim().is_empty() {
                lines.push(format!("  {word}"));
            } else {
                if !line.is_empty() {
                    line.push(' ');
                }
                line.push_str(word);
            }
        }
        lines.iter().try_for_each(|line| self.line(style, line))
    }

    fn line(&self, style: Style, line: &str) -> io::Result<()> {
        println(&format!("{INDENT}{}", self.styled(style, line)))
    }

    fn styled(&self, style: Style, text: &str) -> String {
        let code = match style {
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Cyan => "36",
            Style::Plain => return text.to_owned(),
        };
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// As the macro, for an output that may be gone.
fn println(line: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")
}
