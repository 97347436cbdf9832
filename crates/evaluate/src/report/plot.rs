//! Plots as inline SVG. Colours name roles: the page's style sheet maps them to its light or dark theme.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Error;
use super::text::{html, short};

/// Text.
pub(super) const INK: RGBColor = RGBColor(0x57, 0x60, 0x6a);
/// Grid lines.
pub(super) const GRID: RGBColor = RGBColor(0xd8, 0xde, 0xe4);
/// What something is compared with.
pub(super) const BEFORE: RGBColor = RGBColor(0xb4, 0xbc, 0xc6);
/// What this run made.
pub(super) const AFTER: RGBColor = RGBColor(0x2f, 0x6f, 0xde);
/// Lines, distinct on light and on dark ground.
pub(super) const LINES: [RGBColor; 8] = [
    RGBColor(0x2f, 0x7e, 0xd8),
    RGBColor(0xe0, 0x7b, 0x39),
    RGBColor(0x2f, 0xa2, 0x7a),
    RGBColor(0xb4, 0x55, 0xc8),
    RGBColor(0xc9, 0xa2, 0x27),
    RGBColor(0xd6, 0x45, 0x60),
    RGBColor(0x3f, 0xb0, 0xc9),
    RGBColor(0x8f, 0x72, 0x62),
];
/// Steps of a heat map: nothing, hardly anything, then from little to much.
pub(super) const HEAT: [RGBColor; 7] = [
    RGBColor(0xd1, 0x24, 0x2f),
    RGBColor(0xf0, 0x9a, 0x3e),
    RGBColor(0xdd, 0xea, 0xf8),
    RGBColor(0xa9, 0xcc, 0xf0),
    RGBColor(0x6b, 0xa5, 0xe2),
    RGBColor(0x34, 0x78, 0xc6),
    RGBColor(0x12, 0x4b, 0x8f),
];

/// Narrow enough for the text to stay readable when a phone shrinks the plot to its width.
const WIDTH: u32 = 480;
/// Plotters divides sizes by 1.24: twelve pixels.
const TEXT: i32 = 15;

/// A line of a plot over the layers.
pub(super) struct Line {
    /// (layer, value), the layers increasing; finite values.
    pub(super) points: Vec<(usize, f64)>,
    /// Its colour.
    pub(super) color: RGBColor,
}

/// A bar, or several above one another, with a label.
pub(super) struct Bar {
    /// To the left above the bars.
    pub(super) label: String,
    /// To the right above them.
    pub(super) value: String,
    /// Their lengths, not negative, to any scale that all bars of a plot share.
    pub(super) lengths: Vec<(f64, RGBColor)>,
}

/// Lines over the layers; `zero` keeps the line of no difference in sight.
pub(super) fn lines(title: &str, lines: &[Line], zero: bool) -> Result<String, Error> {
    let values = || lines.iter().flat_map(|line| line.points.iter().map(|&(_, value)| value));
    let (mut low, mut high) = values().fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(v), b.max(v)));
    if zero {
        (low, high) = (low.min(0.0), high.max(0.0));
    }
    let margin = ((high - low) * 0.08).max(0.25);
    let y = low - margin..high + margin;
    let last = lines.iter().filter_map(|line| line.points.last()).map(|&(layer, _)| layer).max().unwrap_or(0);
    svg(title, (WIDTH, 270), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(8)
            .margin_right(10)
            .x_label_area_size(36)
            .y_label_area_size(40)
            .build_cartesian_2d(-0.5..last as f64 + 0.5, y)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(text(HPos::Center))
            .x_labels(13)
            .y_labels(6)
            .set_all_tick_mark_size(3)
            .x_label_formatter(&|layer| {
                if layer.fract() == 0.0 { format!("{layer:.0}") } else { String::new() }
            })
            .y_label_formatter(&|value| tick(*value))
            .x_desc("layer")
            .draw()?;
        if zero {
            chart.draw_series(LineSeries::new(
                [(-0.5, 0.0), (last as f64 + 0.5, 0.0)],
                BEFORE.stroke_width(2),
            ))?;
        }
        for line in lines {
            let points = || line.points.iter().map(|&(layer, value)| (layer as f64, value));
            chart.draw_series(LineSeries::new(points(), line.color.stroke_width(2)))?;
            chart.draw_series(points().map(|point| Circle::new(point, 3, line.color.filled())))?;
        }
        Ok(())
    })
}

/// Horizontal bars, the longest as long as the plot is wide.
pub(super) fn bars(title: &str, bars: &[Bar]) -> Result<String, Error> {
    const HEIGHT: i32 = 11;
    let lengths = || bars.iter().flat_map(|bar| bar.lengths.iter().map(|&(length, _)| length));
    let longest = lengths().fold(f64::MIN_POSITIVE, f64::max);
    let row = |bar: &Bar| 34 + (HEIGHT + 3) * bar.lengths.len() as i32;
    let height: i32 = bars.iter().map(row).sum();
    let right = WIDTH as i32 - 2;
    svg(title, (WIDTH, height as u32), |area| {
        let mut top = 0;
        for bar in bars {
            area.draw(&Text::new(short(&bar.label, 32), (2, top + 9), text(HPos::Left)))?;
            area.draw(&Text::new(short(&bar.value, 48), (right, top + 9), text(HPos::Right)))?;
            for (place, &(length, color)) in bar.lengths.iter().enumerate() {
                let y = top + 22 + (HEIGHT + 3) * place as i32;
                // A pixel at least: a part that is small is not a part that is absent.
                let end = 2 + ((f64::from(right - 2) * (length / longest)).round() as i32).max(1);
                area.draw(&Rectangle::new([(2, y), (end, y + HEIGHT)], color.filled()))?;
            }
            top += row(bar);
        }
        Ok(())
    })
}

/// A cell per column (an expert) and row (a layer), in the colour that `step` gives as a place in [`HEAT`]. Rows may be ragged.
pub(super) fn heat_map(title: &str, rows: &[Vec<u64>], step: impl Fn(u64) -> usize) -> Result<String, Error> {
    const LEFT: i32 = 44;
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0).max(1) as i32;
    let width = (916 / columns).clamp(2, 40);
    let height = (400 / rows.len().max(1) as i32).clamp(8, 20);
    let size = ((LEFT + width * columns + 12).max(240), height * rows.len() as i32 + 40);
    svg(title, (size.0 as u32, size.1 as u32), |area| {
        for (layer, row) in rows.iter().enumerate() {
            let top = layer as i32 * height;
            // Neighbours of one colour are one rectangle: the page of a model of 128 experts stays small.
            let mut start = 0;
            for run in row.chunk_by(|&a, &b| step(a) == step(b)) {
                let end = start + run.len() as i32;
                let corners = [(LEFT + start * width, top), (LEFT + end * width, top + height - 1)];
                area.draw(&Rectangle::new(corners, HEAT[step(run[0]).min(HEAT.len() - 1)].filled()))?;
                start = end;
            }
            if layer % stride(rows.len() as i32, 18) as usize == 0 {
                let place = (LEFT - 6, top + height / 2);
                area.draw(&Text::new(layer.to_string(), place, text(HPos::Right)))?;
            }
        }
        let bottom = height * rows.len() as i32;
        for expert in (0..columns).step_by(stride(columns, 17) as usize) {
            let place = (LEFT + expert * width + width / 2, bottom + 12);
            area.draw(&Text::new(expert.to_string(), place, text(HPos::Center)))?;
        }
        area.draw(&Text::new("expert", (LEFT, bottom + 30), text(HPos::Left)))?;
        let turned = text(HPos::Center).transform(FontTransform::Rotate270);
        area.draw(&Text::new("layer", (8, bottom / 2), turned))?;
        Ok(())
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawError<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

/// Draws, and says to those who cannot see it what it shows.
fn svg(
    title: &str,
    size: (u32, u32),
    draw: impl for<'a> FnOnce(&Area<'a>) -> Result<(), DrawError<'a>>,
) -> Result<String, Error> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&area)
            .and_then(|()| area.present())
            .map_err(|error| Error::Plot { plot: title.to_owned(), message: error.to_string() })?;
    }
    Ok(svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", html(title)), 1))
}

fn text(horizontal: HPos) -> TextStyle<'static> {
    ("sans-serif", TEXT).into_text_style(&(WIDTH, WIDTH)).color(&INK).pos(Pos::new(horizontal, VPos::Center))
}

/// At most one decimal, and none that says nothing.
fn tick(value: f64) -> String {
    let text = format!("{value:.1}");
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text == "-0" { "0".to_owned() } else { text.replace('-', "−") }
}

/// The smallest power of two that leaves at most `limit` of `count` labels.
fn stride(count: i32, limit: i32) -> i32 {
    let mut stride = 1;
    while count / stride > limit {
        stride *= 2;
    }
    stride
}
