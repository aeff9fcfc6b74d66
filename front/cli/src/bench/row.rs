//! One line of the table.

use std::fmt::Write as _;

use serde::Serialize;

use super::rounds::Sample;

/// In what a comparison counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    /// Nanoseconds an operation; fewer are better.
    Nanoseconds,
    /// Microseconds an operation; fewer are better.
    Microseconds,
    /// Mebibytes a second; more are better.
    MebibytesPerSecond,
    /// Operations a second; more are better.
    PerSecond,
    /// Bytes of memory; fewer are better.
    Bytes,
    /// Instructions; fewer are better.
    Instructions,
    /// Events; fewer are better.
    Count,
    /// Multiples of what the row names; fewer are better.
    #[cfg(feature = "etcd")]
    Times,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Nanoseconds => format!("{value:.0} ns"),
            Self::Microseconds => format!("{value:.1} us"),
            Self::MebibytesPerSecond => format!("{value:.0} MiB/s"),
            Self::PerSecond => format!("{:.1} k/s", value / 1e3),
            Self::Bytes => format!("{:.1} MiB", value / f64::from(1 << 20)),
            #[cfg(feature = "etcd")]
            Self::Times => format!("{value:.2}"),
            Self::Instructions | Self::Count => format!("{value:.0}"),
        }
    }

    fn more_is_better(self) -> bool {
        matches!(self, Self::MebibytesPerSecond | Self::PerSecond)
    }
}

/// What a comparison is held to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    /// So many times as good as the other side, at least.
    TimesAsGood(f64),
    /// Ours is at most this much.
    AtMost(f64),
}

/// How a comparison ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// The target is met.
    Met,
    /// The target is missed.
    Missed,
    /// There is no target.
    Shown,
    /// It could not be measured here.
    Skipped,
}

/// One comparison.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// What is done.
    about: String,
    unit: Unit,
    pinfold: Option<Sample>,
    other_name: String,
    other: Option<Sample>,
    /// How many times as good this library is.
    ratio: Option<f64>,
    target: Option<Target>,
    outcome: Outcome,
    note: Option<String>,
}

impl Row {
    /// A comparison of two sides.
    pub(super) fn new(
        about: impl Into<String>,
        unit: Unit,
        pinfold: Sample,
        other_name: impl Into<String>,
        other: Sample,
    ) -> Self {
        let quotient = pinfold.median / other.median;
        let ratio = if unit.more_is_better() {
            quotient
        } else {
            quotient.recip()
        };
        Self {
            about: about.into(),
            unit,
            pinfold: Some(pinfold),
            other_name: other_name.into(),
            other: Some(other),
            ratio: ratio.is_finite().then_some(ratio),
            target: None,
            outcome: Outcome::Shown,
            note: None,
        }
    }

    /// A number of ours that nothing is set beside.
    pub(super) fn alone(about: impl Into<String>, unit: Unit, pinfold: Sample) -> Self {
        let mut row = Self::new(about, unit, pinfold, "", Sample::exactly(f64::NAN));
        row.other = None;
        row
    }

    /// A comparison that cannot be made here.
    pub(super) fn skipped(about: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            about: about.into(),
            unit: Unit::Count,
            pinfold: None,
            other_name: String::new(),
            other: None,
            ratio: None,
            target: None,
            outcome: Outcome::Skipped,
            note: Some(why.into()),
        }
    }

    /// Holds it to a target.
    pub(super) fn held_to(mut self, target: Target) -> Self {
        let met = match target {
            Target::TimesAsGood(times) => self.ratio.is_some_and(|ratio| ratio >= times),
            Target::AtMost(most) => self.pinfold.is_some_and(|ours| ours.median <= most),
        };
        self.target = Some(target);
        self.outcome = if met { Outcome::Met } else { Outcome::Missed };
        self
    }

    /// Adds what a reader has to know.
    pub(super) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    pub(super) fn outcome(&self) -> Outcome {
        self.outcome
    }

    fn line(&self) -> String {
        let mut line = format!("  {:<44}", self.about);
        if let Some(ours) = self.pinfold {
            let _ = write!(line, " {:>28}", self.show(ours));
        }
        if let Some(other) = self.other {
            let _ = write!(line, "   {:<24} {:>28}", self.other_name, self.show(other));
        }
        if let Some(ratio) = self.ratio.filter(|_| self.other.is_some()) {
            let _ = write!(line, "   {ratio:>5.2}x");
        }
        match self.target {
            Some(Target::TimesAsGood(times)) => {
                let _ = write!(line, "  (target {times}x: {})", self.word());
            }
            Some(Target::AtMost(most)) => {
                let _ = write!(
                    line,
                    "  (target at most {}: {})",
                    self.unit.show(most),
                    self.word()
                );
            }
            None if self.outcome == Outcome::Skipped => line.push_str(" skipped"),
            None => {}
        }
        if let Some(note) = &self.note {
            let _ = write!(line, "\n      {note}");
        }
        line
    }

    fn show(&self, sample: Sample) -> String {
        let median = self.unit.show(sample.median);
        if sample.low == sample.high {
            return median;
        }
        let (low, high) = (self.unit.show(sample.low), self.unit.show(sample.high));
        let bare = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
        format!("{median} ({}-{})", bare(&low), bare(&high))
    }

    fn word(&self) -> &'static str {
        match self.outcome {
            Outcome::Met => "met",
            Outcome::Missed => "MISSED",
            Outcome::Shown => "shown",
            Outcome::Skipped => "skipped",
        }
    }
}

/// Lays the rows of one group out.
pub(super) fn table(group: &str, rows: &[Row]) -> String {
    let mut text = format!("{group}\n");
    for row in rows {
        text.push_str(&row.line());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(unit: Unit, ours: f64, other: f64) -> Row {
        Row::new(
            "it",
            unit,
            Sample::exactly(ours),
            "kernel",
            Sample::exactly(other),
        )
    }

    #[test]
    fn a_ratio_above_one_is_always_in_our_favour() {
        assert_eq!(row(Unit::Nanoseconds, 100.0, 400.0).ratio, Some(4.0));
        assert_eq!(row(Unit::MebibytesPerSecond, 400.0, 100.0).ratio, Some(4.0));
    }

    #[test]
    fn a_target_is_met_or_missed() {
        let met = row(Unit::Nanoseconds, 100.0, 600.0).held_to(Target::TimesAsGood(6.0));
        assert_eq!(met.outcome(), Outcome::Met);
        let missed = row(Unit::Nanoseconds, 100.0, 590.0).held_to(Target::TimesAsGood(6.0));
        assert_eq!(missed.outcome(), Outcome::Missed);
        assert!(missed.line().contains("MISSED"));
        let faults =
            Row::alone("faults", Unit::Count, Sample::exactly(1.0)).held_to(Target::AtMost(0.0));
        assert_eq!(faults.outcome(), Outcome::Missed);
    }

    #[test]
    fn what_could_not_be_measured_is_no_success() {
        let broken = row(Unit::Nanoseconds, f64::NAN, 5.0).held_to(Target::TimesAsGood(0.0));
        assert_eq!(broken.outcome(), Outcome::Missed);
        assert_eq!(Row::skipped("it", "no fio").outcome(), Outcome::Skipped);
    }
}
