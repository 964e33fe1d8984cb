//! Bars as SVG: a row of three panels for each section. Pure.

use std::fmt::Write;

use crate::statistics::Spread;
use crate::summary::{Row, Summary};

/// Sizes in pixels.
const NAME_WIDTH: f64 = 160.0;
const PANEL_WIDTH: f64 = 260.0;
const BAR_WIDTH_MAX: f64 = 170.0;
const BAR_HEIGHT: f64 = 14.0;
const ROW_HEIGHT: f64 = 20.0;
const TITLE_HEIGHT: f64 = 44.0;
const MARGIN: f64 = 16.0;

/// Colours of the tracker's bars and of the others.
const OWN_COLOUR: &str = "#2a6f97";
const OTHER_COLOUR: &str = "#a9a9a9";

/// One figure of each row.
type Figure = fn(&Row) -> Option<Spread>;

/// A picture of all sections.
pub fn draw(summaries: &[Summary]) -> String {
    let mut body = String::new();
    let mut top = MARGIN;
    for summary in summaries {
        section(&mut body, summary, top);
        top += TITLE_HEIGHT + summary.rows.len() as f64 * ROW_HEIGHT + MARGIN;
    }
    let width = 2.0 * MARGIN + NAME_WIDTH + 3.0 * PANEL_WIDTH;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{top}\" \
         viewBox=\"0 0 {width} {top}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{top}\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn section(body: &mut String, summary: &Summary, top: f64) {
    text(
        body,
        MARGIN,
        top + 14.0,
        "font-size=\"14\" font-weight=\"bold\"",
        &summary.title,
    );
    let first = top + TITLE_HEIGHT;
    for (index, row) in summary.rows.iter().enumerate() {
        let y = first + index as f64 * ROW_HEIGHT + 11.0;
        text(body, MARGIN, y, "", row.server);
    }
    let panels: [(&str, Figure, usize); 3] = [
        (summary.unit, |row| Some(row.rate), 0),
        (
            "server time per request, us",
            |row| row.server_microseconds,
            2,
        ),
        ("latency p99, us", |row| Some(row.p99), 0),
    ];
    for (index, (title, figure, decimals)) in panels.into_iter().enumerate() {
        let left = MARGIN + NAME_WIDTH + index as f64 * PANEL_WIDTH;
        text(body, left, top + 34.0, "fill=\"#555\"", title);
        panel(body, summary, (left, first), figure, decimals);
    }
}

fn panel(
    body: &mut String,
    summary: &Summary,
    (left, top): (f64, f64),
    figure: Figure,
    decimals: usize,
) {
    let most = summary
        .rows
        .iter()
        .filter_map(figure)
        .map(|spread| spread.maximum)
        .fold(f64::EPSILON, f64::max);
    for (index, row) in summary.rows.iter().enumerate() {
        let Some(spread) = figure(row) else { continue };
        let y = top + index as f64 * ROW_HEIGHT;
        let middle = y + BAR_HEIGHT / 2.0;
        let x = |value: f64| left + value / most * BAR_WIDTH_MAX;
        let colour = if row.server.starts_with("tracker") {
            OWN_COLOUR
        } else {
            OTHER_COLOUR
        };
        element(
            body,
            format_args!(
                "<rect x=\"{left:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>",
                x(spread.median) - left,
            ),
        );
        element(
            body,
            format_args!(
                "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>",
                x(spread.minimum),
                x(spread.maximum),
            ),
        );
        let value = format!("{:.decimals$}", spread.median);
        text(body, x(spread.maximum) + 5.0, y + 11.0, "", &value);
    }
}

fn text(body: &mut String, x: f64, y: f64, style: &str, words: &str) {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    element(
        body,
        format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{words}</text>"),
    );
}

fn element(body: &mut String, words: std::fmt::Arguments) {
    // Writing into a string cannot fail.
    let _written = body.write_fmt(words);
    body.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_a_bar_for_each_figure_and_escapes_words() {
        let spread = Spread::of(vec![1.0, 2.0, 3.0]).unwrap();
        let row = Row {
            server: "a<b",
            rate: spread,
            p50: spread,
            p99: spread,
            p999: spread,
            server_microseconds: None,
            switches: None,
            calls: None,
            disturbed: 0,
        };
        let summary = Summary {
            title: "x & y".to_owned(),
            unit: "IOPS",
            rows: vec![row.clone(), row],
            best_peer: None,
            ratios: Vec::new(),
        };
        let svg = draw(&[summary]);
        assert_eq!(svg.matches("<line").count(), 4);
        assert!(svg.contains("a&lt;b") && svg.contains("x &amp; y"));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
