//! What a command has to say to people, in columns.

use crate::finding::printable;

/// Three columns: a section's label, what a row is about, what there is to say of it.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<(&'static str, String, String)>,
    label: &'static str,
}

impl Table {
    /// The label of the next row.
    pub(crate) fn section(&mut self, label: &'static str) {
        self.label = label;
    }

    pub(crate) fn row(&mut self, subject: impl Into<String>, text: impl Into<String>) {
        let label = std::mem::take(&mut self.label);
        self.rows.push((label, printable(&subject.into()), printable(&text.into())));
    }

    pub(crate) fn text(&self) -> String {
        const WIDEST: usize = 28;
        let width = |text: &str| text.chars().count();
        let label = self.rows.iter().map(|(label, ..)| width(label)).max().unwrap_or(0) + 2;
        let with_text = self.rows.iter().filter(|(_, subject, text)| !text.is_empty() && width(subject) <= WIDEST);
        let subject = with_text.map(|(_, subject, _)| width(subject)).max().unwrap_or(0) + 2;
        let line = |(name, about, text): &(&str, String, String)| {
            let line = format!("{name:label$}{about:subject$}");
            let gap = if width(about) >= subject && !text.is_empty() { "  " } else { "" };
            format!("{}\n", format!("{line}{gap}{text}").trim_end())
        };
        self.rows.iter().map(line).collect()
    }
}
