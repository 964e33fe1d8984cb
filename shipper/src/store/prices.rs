//! What a store asks for requests, as the configuration says it. Pure.

use serde::Deserialize;

use super::counted::{Requests, Sum};

/// Section `[prices]` of a configuration: amounts in whatever currency they are written in. What is not named costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prices {
    /// Of 1000 objects that are stored.
    put_per_1000: f64,
    /// Of 1000 objects or ranges that are read.
    get_per_1000: f64,
    /// Of 1000 looks at an object.
    head_per_1000: f64,
    /// Of 1000 pages of listings.
    list_per_1000: f64,
    /// Of 1000 objects that are removed.
    delete_per_1000: f64,
    /// Of each GiB that is read.
    read_per_gib: f64,
}

impl Prices {
    fn all(&self) -> [(&'static str, f64); 6] {
        [
            ("put_per_1000", self.put_per_1000),
            ("get_per_1000", self.get_per_1000),
            ("head_per_1000", self.head_per_1000),
            ("list_per_1000", self.list_per_1000),
            ("delete_per_1000", self.delete_per_1000),
            ("read_per_gib", self.read_per_gib),
        ]
    }

    /// The prices, if all of them can be.
    ///
    /// # Errors
    ///
    /// One is negative, or not a number.
    pub fn checked(self) -> Result<Self, String> {
        match self
            .all()
            .iter()
            .find(|(_, price)| !price.is_finite() || *price < 0.0)
        {
            Some((key, price)) => Err(format!("prices: {key}: {price} is no price")),
            None => Ok(self),
        }
    }

    /// What these requests cost, in the currency of the prices.
    pub fn cost(&self, requests: &Requests) -> f64 {
        let thousands = |sum: Sum| sum.requests as f64 / 1000.0;
        let read_gib = (requests.get.bytes + requests.list.bytes) as f64 / f64::from(1 << 30);
        self.put_per_1000 * thousands(requests.put)
            + self.get_per_1000 * thousands(requests.get)
            + self.head_per_1000 * thousands(requests.head)
            + self.list_per_1000 * thousands(requests.list)
            + self.delete_per_1000 * thousands(requests.delete)
            + self.read_per_gib * read_gib
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(requests: u64, bytes: u64) -> Sum {
        Sum { requests, bytes }
    }

    #[test]
    fn each_kind_has_its_price() {
        let text = "put_per_1000 = 0.005\nget_per_1000 = 0.0004\nhead_per_1000 = 0.0004\nlist_per_1000 = 0.005\nread_per_gib = 0.09";
        let prices: Prices = toml::from_str(text).unwrap();
        let requests = Requests {
            put: sum(2000, 1 << 40),
            get: sum(10_000, 3 << 30),
            head: sum(500, 0),
            list: sum(100, 0),
            delete: sum(1_000_000, 0),
            ..Requests::default()
        };
        let expected = 0.01 + 0.004 + 0.0002 + 0.0005 + 0.27;
        let cost = prices.checked().unwrap().cost(&requests);
        assert!((cost - expected).abs() < 1e-9, "{cost}");
        assert_eq!(Prices::default().cost(&requests), 0.0);
    }

    #[test]
    fn no_price_is_below_zero() {
        for text in [
            "put_per_1000 = -1.0",
            "read_per_gib = nan",
            "get_per_1000 = inf",
        ] {
            let prices: Prices = toml::from_str(text).unwrap();
            assert!(prices.checked().is_err(), "{text}");
        }
        assert!(toml::from_str::<Prices>("copy_per_1000 = 1.0").is_err());
    }
}
