//! Plots, as SVG.

use crate::eval::EvalError;
use plotters::{
    coord::Shift,
    prelude::{
        ChartBuilder, Circle, DrawingArea, IntoDrawingArea, IntoFont, IntoLogRange, LineSeries, Palette, Palette99,
        PathElement, Rectangle, SVGBackend, Text,
    },
    style::{
        BLACK, Color, RGBColor, WHITE,
        text_anchor::{HPos, Pos, VPos},
    },
};
use std::{fmt::Display, ops::Range};

const FONT: &str = "sans-serif";
const GREY: RGBColor = RGBColor(150, 150, 150);
const BLUE: RGBColor = RGBColor(31, 90, 160);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A measured point.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Along the first axis.
    pub x: f64,
    /// Along the second.
    pub y: f64,
    /// Standard error of y.
    pub error: Option<f64>,
    /// What stands beside it.
    pub label: String,
}

/// Points that belong together, by rising x.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// What the legend calls it.
    pub name: String,
    /// Its points.
    pub points: Vec<Point>,
}

/// Shares by row and column.
pub struct Heat<'a> {
    /// What columns and rows are.
    pub axes: [&'a str; 2],
    pub columns: &'a [String],
    pub rows: &'a [String],
    /// From 0 to 1, `values[row][column]`.
    pub values: &'a [Vec<f64>],
}

/// Bars side by side.
pub struct Bars<'a> {
    pub axes: [&'a str; 2],
    /// What the groups of bars are.
    pub names: &'a [String],
    /// A name, and a value for each group.
    pub series: &'a [(&'a str, Vec<f64>)],
}

/// An SVG of `size` pixels with what `paint` draws.
fn draw(size: (u32, u32), paint: impl FnOnce(&Area<'_>) -> Result<(), EvalError>) -> Result<String, EvalError> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    area.fill(&WHITE).map_err(plot)?;
    paint(&area)?;
    area.present().map_err(plot)?;
    drop(area);
    Ok(svg)
}

fn plot(error: impl Display) -> EvalError {
    EvalError::Plot(error.to_string())
}

/// From the least to the most of `values`, with a share of room around; never empty.
fn around(values: impl Iterator<Item = f64> + Clone, room: f64) -> Range<f64> {
    let (least, most) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max));
    let margin = ((most - least) * room).max(most.abs() * 0.01).max(f64::MIN_POSITIVE);
    least - margin..most + margin
}

/// [`around`] for a logarithmic axis.
fn log_around(values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
    let Range { start, end } = around(values.map(f64::ln), 0.12);
    // Less than a doubling would leave the axis without marks.
    let widen = ((2.5 - (end - start)) / 2.0).max(0.0);
    (start - widen).exp()..(end + widen).exp()
}

/// A number as shortly as it is told apart.
fn short(x: &f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        size if (0.001..100_000.0).contains(&size) => format!("{}", (x * 1e4).round() / 1e4),
        _ => format!("{x:.0e}"),
    }
}

/// Points with labels on logarithmic axes; all are above zero.
pub fn frontier(axes: [&str; 2], points: &[Point]) -> Result<String, EvalError> {
    draw((760, 480), |area| {
        let low = |point: &Point| point.error.map_or(point.y, |error| (point.y - error).max(point.y / 3.0));
        let high = |point: &Point| point.error.map_or(point.y, |error| point.y + error);
        let x = log_around(points.iter().map(|point| point.x));
        let y = log_around(points.iter().flat_map(|point| [low(point), high(point)]));
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(x.log_scale(), y.log_scale())
            .map_err(plot)?;
        let [x, y] = axes;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(x).y_desc(y).x_label_formatter(&short).y_label_formatter(&short).label_style((FONT, 13));
        mesh.bold_line_style(BLACK.mix(0.12)).light_line_style(BLACK.mix(0.04)).draw().map_err(plot)?;
        let front = front(points).into_iter().map(|point| (point.x, point.y));
        chart.draw_series(LineSeries::new(front, GREY)).map_err(plot)?;
        let bars = points.iter().map(|point| PathElement::new([(point.x, low(point)), (point.x, high(point))], BLUE));
        chart.draw_series(bars).map_err(plot)?;
        let dots = points.iter().map(|point| Circle::new((point.x, point.y), 4, BLUE.filled()));
        chart.draw_series(dots).map_err(plot)?;
        let style = (FONT, 14).into_font().color(&BLACK).pos(Pos::new(HPos::Left, VPos::Bottom));
        let labels = points.iter().map(|point| {
            plotters::element::EmptyElement::at((point.x, point.y))
                + Text::new(point.label.clone(), (6, -2), style.clone())
        });
        chart.draw_series(labels).map_err(plot)?;
        Ok(())
    })
}

/// The points that no other has both further left and further down, from the left.
fn front(points: &[Point]) -> Vec<&Point> {
    let mut sorted: Vec<_> = points.iter().collect();
    sorted.sort_by(|a, b| a.x.total_cmp(&b.x).then(a.y.total_cmp(&b.y)));
    let mut least = f64::INFINITY;
    sorted.retain(|point| {
        let better = point.y < least;
        least = least.min(point.y);
        better
    });
    sorted
}

/// Lines with error bars, as SVG; `base` is drawn across.
///
/// # Errors
/// [`EvalError::Plot`] where a plot cannot be drawn.
pub fn lines(axes: [&str; 2], base: Option<f64>, lines: &[Line]) -> Result<String, EvalError> {
    draw((760, 420), |area| {
        let points = || lines.iter().flat_map(|line| &line.points);
        let spread = |point: &Point| {
            let error = point.error.unwrap_or_default();
            [point.y - error, point.y + error]
        };
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(
                around(points().map(|point| point.x), 0.08),
                around(points().flat_map(spread).chain(base), 0.08),
            )
            .map_err(plot)?;
        let [x, y] = axes;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(x).y_desc(y).x_label_formatter(&short).y_label_formatter(&short).label_style((FONT, 13));
        mesh.bold_line_style(BLACK.mix(0.12)).light_line_style(BLACK.mix(0.0)).draw().map_err(plot)?;
        if let Some(base) = base {
            let Range { start, end } = around(points().map(|point| point.x), 0.08);
            chart.draw_series(LineSeries::new([(start, base), (end, base)], GREY)).map_err(plot)?;
        }
        for (at, line) in lines.iter().enumerate() {
            let color = Palette99::pick(at).to_rgba();
            let path = line.points.iter().map(|point| (point.x, point.y));
            let drawn = chart.draw_series(LineSeries::new(path, color.stroke_width(2))).map_err(plot)?;
            drawn.label(line.name.as_str()).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color));
            let bars = line.points.iter().map(|point| {
                let [low, high] = spread(point);
                PathElement::new([(point.x, low), (point.x, high)], color)
            });
            chart.draw_series(bars).map_err(plot)?;
            let dots = line.points.iter().map(|point| Circle::new((point.x, point.y), 3, color.filled()));
            chart.draw_series(dots).map_err(plot)?;
        }
        let mut labels = chart.configure_series_labels();
        labels.background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.2)).label_font((FONT, 13));
        labels.position(plotters::chart::SeriesLabelPosition::UpperLeft).draw().map_err(plot)
    })
}

/// A heat map with its shares written out.
pub fn heat(heat: &Heat<'_>) -> Result<String, EvalError> {
    const CELL: (i32, i32) = (92, 34);
    const EDGE: (i32, i32) = (84, 44);
    let size = (EDGE.0 + CELL.0 * heat.columns.len() as i32, EDGE.1 + CELL.1 * heat.rows.len() as i32);
    draw((size.0 as u32 + 1, size.1 as u32 + 1), |area| {
        let font = (FONT, 14).into_font();
        let centred = font.color(&BLACK).pos(Pos::new(HPos::Center, VPos::Center));
        let write = |text: &str, x: i32, y: i32, white: bool| {
            let style = if white { centred.clone().color(&WHITE) } else { centred.clone() };
            area.draw(&Text::new(text.to_owned(), (x, y), style)).map_err(plot)
        };
        let [columns, rows] = heat.axes;
        write(&format!("{rows} \\ {columns}"), EDGE.0 / 2, EDGE.1 / 2, false)?;
        for (column, name) in heat.columns.iter().enumerate() {
            write(name, EDGE.0 + CELL.0 * column as i32 + CELL.0 / 2, EDGE.1 / 2, false)?;
        }
        for (row, (name, values)) in heat.rows.iter().zip(heat.values).enumerate() {
            let top = EDGE.1 + CELL.1 * row as i32;
            write(name, EDGE.0 / 2, top + CELL.1 / 2, false)?;
            for (column, &share) in values.iter().enumerate() {
                let left = EDGE.0 + CELL.0 * column as i32;
                let cell = [(left, top), (left + CELL.0, top + CELL.1)];
                area.draw(&Rectangle::new(cell, shade(share).filled())).map_err(plot)?;
                area.draw(&Rectangle::new(cell, WHITE.stroke_width(2))).map_err(plot)?;
                let text = format!("{:.0}%", 100.0 * share);
                write(&text, left + CELL.0 / 2, top + CELL.1 / 2, share > 0.55)?;
            }
        }
        Ok(())
    })
}

/// From a pale red for nothing over white to a dark blue for all.
fn shade(share: f64) -> RGBColor {
    let mix =
        |from: u8, to: u8, by: f64| (f64::from(from) + (f64::from(to) - f64::from(from)) * by.clamp(0.0, 1.0)) as u8;
    let (from, to, by) = if share < 0.5 {
        ((235, 190, 180), (240, 240, 240), 2.0 * share)
    } else {
        ((240, 240, 240), (BLUE.0, BLUE.1, BLUE.2), 2.0 * share - 1.0)
    };
    RGBColor(mix(from.0, to.0, by), mix(from.1, to.1, by), mix(from.2, to.2, by))
}

/// Groups of bars from zero upwards.
pub fn bars(bars: &Bars<'_>) -> Result<String, EvalError> {
    draw((900, 320), |area| {
        let most = bars.series.iter().flat_map(|(_, values)| values).copied().fold(f64::MIN_POSITIVE, f64::max);
        let groups = bars.names.len();
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(-0.5..groups as f64 - 0.5, 0.0..most * 1.15)
            .map_err(plot)?;
        let [x, y] = bars.axes;
        let name = |x: &f64| {
            // Marks between groups have no name.
            let at = x.round();
            let name = bars.names.get(at as usize).filter(|_| (x - at).abs() < 1e-6 && at >= 0.0);
            name.cloned().unwrap_or_default()
        };
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(x).y_desc(y).x_labels(groups).x_label_formatter(&name).y_label_formatter(&short);
        mesh.disable_x_mesh().bold_line_style(BLACK.mix(0.12)).light_line_style(BLACK.mix(0.0)).label_style((FONT, 13));
        mesh.draw().map_err(plot)?;
        let width = 0.8 / bars.series.len().max(1) as f64;
        for (at, (name, values)) in bars.series.iter().enumerate() {
            let color = Palette99::pick(at).to_rgba();
            let bar = |(group, &value): (usize, &f64)| {
                let left = group as f64 - 0.4 + width * at as f64;
                Rectangle::new([(left, 0.0), (left + width, value)], color.filled())
            };
            let drawn = chart.draw_series(values.iter().enumerate().map(bar)).map_err(plot)?;
            drawn.label(*name).legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], color.filled()));
        }
        let mut labels = chart.configure_series_labels();
        labels.background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.2)).label_font((FONT, 13));
        labels.position(plotters::chart::SeriesLabelPosition::UpperRight).draw().map_err(plot)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_is_what_nothing_beats() {
        let point = |&(x, y): &(f64, f64)| Point { x, y, error: None, label: String::new() };
        let points: Vec<_> =
            [(5.0, 1.0), (1.0, 4.0), (2.0, 4.0), (2.0, 3.0), (3.0, 3.5), (5.0, 0.5)].iter().map(point).collect();
        let front: Vec<_> = front(&points).iter().map(|point| (point.x, point.y)).collect();
        assert_eq!(front, [(1.0, 4.0), (2.0, 3.0), (5.0, 0.5)]);
    }

    #[test]
    fn numbers_are_short() {
        for (x, text) in [(0.0, "0"), (0.012, "0.012"), (20_000.0, "20000"), (1e-5, "1e-5"), (0.300_000_01, "0.3")] {
            assert_eq!(short(&x), text);
        }
    }
}
