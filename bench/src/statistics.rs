//! Median and extremes. Pure.

use serde::Serialize;

/// Median, least and greatest of some values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The one in the middle.
    pub median: f64,
    /// The least.
    pub minimum: f64,
    /// The greatest.
    pub maximum: f64,
}

impl Spread {
    /// Of any number of values; of none there is no spread.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let lower = *values.get((values.len() - 1) / 2)?;
        Some(Self {
            median: (lower + upper) / 2.0,
            minimum: *values.first()?,
            maximum: *values.last()?,
        })
    }

    /// `median (least to most)` with so many decimals.
    pub fn text(&self, decimals: usize) -> String {
        format!(
            "{:.decimals$} ({:.decimals$} to {:.decimals$})",
            self.median, self.minimum, self.maximum
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_values() {
        let median = |values: &[f64]| Spread::of(values.to_vec()).map(|spread| spread.median);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_spread_reads_well() {
        let spread = Spread::of(vec![1.0, 2.0, 3.5]).unwrap();
        assert_eq!(spread.text(1), "2.0 (1.0 to 3.5)");
    }
}
