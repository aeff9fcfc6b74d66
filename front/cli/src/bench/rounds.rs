//! Sides that take turns, and what is shown meanwhile.

use std::io::IsTerminal as _;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// What one side measured over all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Sample {
    pub(super) median: f64,
    /// A quarter of the rounds were below.
    pub(super) low: f64,
    /// A quarter of the rounds were above.
    pub(super) high: f64,
}

impl Sample {
    /// Sums up what the rounds gave.
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * values.len().saturating_sub(1) as f64;
            let (below, above) = (place.floor() as usize, place.ceil() as usize);
            match (values.get(below), values.get(above)) {
                (Some(a), Some(b)) => a + (b - a) * place.fract(),
                _ => f64::NAN,
            }
        };
        Self {
            median: at(0.5),
            low: at(0.25),
            high: at(0.75),
        }
    }

    /// A number that was not measured in rounds.
    pub(super) fn exactly(value: f64) -> Self {
        Self {
            median: value,
            low: value,
            high: value,
        }
    }
}

/// One side of a comparison: a run gives one measurement of each of its quantities.
pub(super) type Side<'a, const N: usize> = Box<dyn FnMut() -> Result<[f64; N]> + 'a>;

/// Lets the sides take turns, every other round in reverse order; returns each side's samples.
pub(super) fn take_turns<const N: usize>(
    screen: &Screen,
    about: &str,
    rounds: usize,
    mut sides: Vec<Side<'_, N>>,
) -> Result<Vec<[Sample; N]>> {
    let mut values = vec![vec![Vec::with_capacity(rounds); N]; sides.len()];
    screen.begin(about, rounds * sides.len());
    for round in 0..rounds {
        for turn in 0..sides.len() {
            let side = if round % 2 == 0 {
                turn
            } else {
                sides.len() - 1 - turn
            };
            for (into, value) in values[side].iter_mut().zip(sides[side]()?) {
                into.push(value);
            }
            screen.step();
        }
    }
    Ok(values
        .into_iter()
        .map(|side| {
            let mut samples = side.into_iter().map(Sample::of);
            std::array::from_fn(|_| samples.next().unwrap_or(Sample::exactly(f64::NAN)))
        })
        .collect())
}

/// The line that says what is being measured; nothing where standard error is not a terminal.
#[derive(Debug)]
pub(super) struct Screen {
    line: ProgressBar,
}

impl Screen {
    pub(super) fn new() -> Self {
        let line = ProgressBar::new(0);
        if !std::io::stderr().is_terminal() {
            line.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} {prefix} {msg} {pos}/{len} {elapsed}")
        {
            line.set_style(style);
        }
        Self { line }
    }

    pub(super) fn heading(&self, name: &str) {
        self.line.set_prefix(name.to_owned());
    }

    pub(super) fn begin(&self, about: &str, steps: usize) {
        self.line.set_message(about.to_owned());
        self.line.set_length(steps as u64);
        self.line.set_position(0);
    }

    pub(super) fn step(&self) {
        self.line.inc(1);
    }

    pub(super) fn print(&self, text: &str) {
        self.line.suspend(|| println!("{text}"));
    }

    pub(super) fn end(&self) {
        self.line.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_the_median_and_the_quartiles() {
        let sample = Sample::of(vec![5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!((sample.low, sample.median, sample.high), (2.0, 3.0, 4.0));
        assert_eq!(Sample::of(vec![1.0, 2.0]).median, 1.5);
        assert!(Sample::of(Vec::new()).median.is_nan());
    }

    #[test]
    fn sides_take_turns_in_alternating_order() {
        let order = std::cell::RefCell::new(Vec::new());
        let side = |name: u8| -> Side<'_, 1> {
            let order = &order;
            Box::new(move || {
                order.borrow_mut().push(name);
                Ok([f64::from(name)])
            })
        };
        let found = take_turns(&Screen::new(), "test", 2, vec![side(1), side(2)]).unwrap();
        assert_eq!(*order.borrow(), [1, 2, 2, 1]);
        assert_eq!(found[1][0].median, 2.0);
    }
}
