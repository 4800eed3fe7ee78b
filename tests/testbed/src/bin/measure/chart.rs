//! `benches/cost.svg`: the added instructions as bars.

use trimtab_testbed::repository;

use crate::report::thousands;

const WIDTH: f64 = 760.0;
const LABELS: f64 = 300.0;
const ROW: f64 = 30.0;
const TOP: f64 = 52.0;

/// Draws each `(id, instructions)` that has a label.
pub fn draw(added: &[(&str, f64)]) -> Result<(), String> {
    let path = repository().join("benches/cost.svg");
    std::fs::write(&path, svg(added)).map_err(|error| format!("{}: {error}", path.display()))
}

/// What the bar is called, and whether it is one of ours.
fn label(id: &str) -> Option<(&'static str, bool)> {
    Some(match id {
        "native" => ("Envoy's own filters, a part of the job", false),
        "lua" => ("Lua, a part of the job", false),
        "empty" => ("an empty filter on the Rust SDK", false),
        "none" => ("Trimtab: no route of 20 matches", true),
        "limit" => ("Trimtab: a limit per user", true),
        "canary" => ("Trimtab: a sticky canary", true),
        "trace" => ("Trimtab: trace", true),
        "request" => ("Trimtab: 20 routes, canary, limit, trace", true),
        "everything" => ("Trimtab: everything, with judge and fault", true),
        _ => return None,
    })
}

/// It has a page of its own colour, because the one that it is shown on need not be of the colour that the reader's
/// system prefers.
fn svg(added: &[(&str, f64)]) -> String {
    let bars: Vec<_> =
        added.iter().filter_map(|(id, number)| label(id).map(|label| (label, number.max(0.0)))).collect();
    let most = bars.iter().map(|(_, number)| *number).fold(1.0, f64::max);
    let height = TOP + ROW * bars.len() as f64 + 12.0;
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-labelledby="title">
<title id="title">Instructions that a request costs in Envoy beyond a router alone</title>
<style>
.page {{ fill: #ffffff }}
text {{ font: 13px system-ui, sans-serif; fill: #1f2328 }}
.title {{ font-weight: 600 }}
.ours {{ fill: #1a7f74 }}
.theirs {{ fill: #8c959f }}
@media (prefers-color-scheme: dark) {{
  .page {{ fill: #0d1117 }}
  text {{ fill: #e6edf3 }}
  .ours {{ fill: #39b5a6 }}
  .theirs {{ fill: #6e7681 }}
}}
</style>
<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>
<text class="title" x="12" y="24">Instructions a request, beyond a router alone</text>
"##
    );
    for (row, ((label, is_ours), number)) in bars.iter().enumerate() {
        let top = TOP + ROW * row as f64;
        let length = (number / most * (WIDTH - LABELS - 80.0)).round();
        let (text, bar) = (top + 14.0, if *is_ours { "ours" } else { "theirs" });
        svg += &format!(
            r#"<text x="{}" y="{text}" text-anchor="end">{label}</text>
<rect class="{bar}" x="{LABELS}" y="{top}" width="{length}" height="20" rx="2"/>
<text x="{}" y="{text}">{}</text>
"#,
            LABELS - 10.0,
            LABELS + length + 8.0,
            thousands(*number)
        );
    }
    svg += "</svg>\n";
    svg
}
