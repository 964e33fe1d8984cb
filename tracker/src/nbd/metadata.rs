//! Meta contexts: their names, what queries find them, and which a client has selected. Pure.
//!
//! Source: NetworkBlockDevice/nbd, `doc/proto.md`, "Metadata querying", NBD_OPT_LIST_META_CONTEXT
//! and NBD_OPT_SET_META_CONTEXT. Queries find a context by its whole name; LIST also takes a
//! namespace alone (`base:`), and `qemu:dirty-bitmap:`, as wildcards. A namespace that is not known
//! finds nothing, as the specification demands; a query without a colon is malformed.

use super::wire::STRING_BYTES_MAX;

/// A meta context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: holes and zeroes.
    Allocation,
    /// `tidemark:dirty`: bit 0 is set where a block has changed since the last recovery point.
    Dirty,
    /// `qemu:dirty-bitmap:tidemark`: the same under the name by which qemu's clients ask.
    QemuDirty,
}

impl Context {
    /// All contexts, in the order in which they are told.
    pub const ALL: [Self; 3] = [Self::Allocation, Self::Dirty, Self::QemuDirty];

    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Dirty => "tidemark:dirty",
            Self::QemuDirty => "qemu:dirty-bitmap:tidemark",
        }
    }

    /// Its number on the wire: unique, and the same in every negotiation.
    pub fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Dirty => 2,
            Self::QemuDirty => 3,
        }
    }

    /// Whether it tells of changes, which needs a journal.
    pub fn tells_changes(self) -> bool {
        self != Self::Allocation
    }

    /// Whether this query of LIST finds it.
    fn is_listed_by(self, query: &str) -> bool {
        let name = self.name();
        query == name || query.ends_with(':') && name.starts_with(query)
    }
}

/// A set of contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextSet(u8);

impl ContextSet {
    /// No context.
    pub const NONE: Self = Self(0);

    /// Adds one.
    pub fn insert(&mut self, context: Context) {
        self.0 |= 1 << context.id();
    }

    /// Whether one is in it.
    pub fn contains(self, context: Context) -> bool {
        self.0 & (1 << context.id()) != 0
    }

    /// Whether none is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Number of contexts in it.
    pub fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// The contexts in it, in the order of [`Context::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL
            .into_iter()
            .filter(move |context| self.contains(*context))
    }

    /// The subset with these numbers; `None` if one is not in the set or comes twice.
    pub fn select(self, ids: impl Iterator<Item = u32>) -> Option<Self> {
        let mut chosen = Self::default();
        for id in ids {
            let context = self.iter().find(|context| context.id() == id)?;
            if chosen.contains(context) {
                return None;
            }
            chosen.insert(context);
        }
        Some(chosen)
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// Name of the export.
    pub export: &'a [u8],
    /// The queries.
    pub queries: Vec<&'a str>,
}

/// Why the data are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The lengths inside do not add up.
    Lengths,
    /// A string exceeds the protocol's limit.
    LongString,
    /// A query is not UTF-8, or has no namespace.
    Query,
}

impl Malformed {
    /// What it says to a person.
    pub fn text(self) -> &'static str {
        match self {
            Self::Lengths => "The lengths inside the option's data do not add up",
            Self::LongString => "A string of the option exceeds 4096 bytes",
            Self::Query => "A query is not UTF-8 or has no namespace and colon",
        }
    }
}

impl<'a> ContextRequest<'a> {
    /// Understands the data. Memory grows with the bytes that are there, never with a count that
    /// only claims to be.
    ///
    /// # Errors
    ///
    /// The data are malformed.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let (export, rest) = take_string(data)?;
        let (count, mut rest) = rest.split_first_chunk::<4>().ok_or(Malformed::Lengths)?;
        let mut queries = Vec::new();
        for _ in 0..u32::from_be_bytes(*count) {
            let (query, after) = take_string(rest)?;
            let query = std::str::from_utf8(query).map_err(|_| Malformed::Query)?;
            if query
                .split_once(':')
                .is_none_or(|(space, _)| space.is_empty())
            {
                return Err(Malformed::Query);
            }
            queries.push(query);
            rest = after;
        }
        if rest.is_empty() {
            Ok(Self { export, queries })
        } else {
            Err(Malformed::Lengths)
        }
    }

    /// What LIST answers, of the contexts that the export has.
    pub fn listed(&self, available: ContextSet) -> ContextSet {
        if self.queries.is_empty() {
            return available;
        }
        self.matching(available, Context::is_listed_by)
    }

    /// What SET selects, of the contexts that the export has.
    pub fn selected(&self, available: ContextSet) -> ContextSet {
        self.matching(available, |context, query| context.name() == query)
    }

    fn matching(&self, available: ContextSet, fits: fn(Context, &str) -> bool) -> ContextSet {
        let mut found = ContextSet::default();
        for context in available.iter() {
            if self.queries.iter().any(|query| fits(context, query)) {
                found.insert(context);
            }
        }
        found
    }
}

/// A string with its length of 32 bits before it, and what follows.
pub fn take_string(data: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let (length, rest) = data.split_first_chunk::<4>().ok_or(Malformed::Lengths)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| Malformed::Lengths)?;
    let parts = rest.split_at_checked(length).ok_or(Malformed::Lengths)?;
    if length > STRING_BYTES_MAX {
        return Err(Malformed::LongString);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(export: &[u8], queries: &[&str]) -> Vec<u8> {
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(export);
        data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend_from_slice(&(query.len() as u32).to_be_bytes());
            data.extend_from_slice(query.as_bytes());
        }
        data
    }

    fn all() -> ContextSet {
        let mut set = ContextSet::default();
        Context::ALL
            .into_iter()
            .for_each(|context| set.insert(context));
        set
    }

    fn found(queries: &[&str]) -> (Vec<u32>, Vec<u32>) {
        let data = encode(b"disk", queries);
        let request = ContextRequest::parse(&data).unwrap();
        let ids = |set: ContextSet| set.iter().map(Context::id).collect();
        (ids(request.listed(all())), ids(request.selected(all())))
    }

    #[test]
    fn wildcards_list_and_never_select() {
        assert_eq!(found(&[]), (vec![1, 2, 3], vec![]));
        assert_eq!(found(&["base:"]), (vec![1], vec![]));
        assert_eq!(found(&["tidemark:"]), (vec![2], vec![]));
        assert_eq!(found(&["qemu:"]), (vec![3], vec![]));
        assert_eq!(found(&["qemu:dirty-bitmap:"]), (vec![3], vec![]));
        assert_eq!(found(&["base:alloc", "x-none:y"]), (vec![], vec![]));
        let twice = ["base:allocation", "tidemark:dirty", "base:allocation"];
        assert_eq!(found(&twice), (vec![1, 2], vec![1, 2]));
    }

    #[test]
    fn malformed_data_are_refused() {
        for (data, why) in [
            (&b""[..], Malformed::Lengths),
            (b"\0\0\0\x01", Malformed::Lengths),
            (b"\xff\xff\xff\xff\0\0\0\0", Malformed::Lengths),
            (b"\0\0\0\0\xff\xff\xff\xff", Malformed::Lengths),
            (b"\0\0\0\0\0\0\0\0x", Malformed::Lengths),
            (b"\0\0\0\0\0\0\0\x01\0\0\0\x01x", Malformed::Query),
            (b"\0\0\0\0\0\0\0\x01\0\0\0\x02:x", Malformed::Query),
            (b"\0\0\0\0\0\0\0\x01\0\0\0\x02\xff:", Malformed::Query),
        ] {
            assert_eq!(ContextRequest::parse(data), Err(why), "{data:?}");
        }
        let long = "x:".repeat(3000);
        let data = encode(b"", &[&long]);
        assert_eq!(ContextRequest::parse(&data), Err(Malformed::LongString));
    }

    #[test]
    fn ids_are_unique_and_chosen_once() {
        assert_eq!(all().count(), 3);
        assert_eq!(
            all().select([2, 1].into_iter()).map(ContextSet::count),
            Some(2)
        );
        assert_eq!(all().select([1, 1].into_iter()), None);
        assert_eq!(all().select([4].into_iter()), None);
        assert_eq!(ContextSet::default().select([1].into_iter()), None);
    }

    proptest! {
        #[test]
        fn decode_encode_decode(
            export in prop::collection::vec(any::<u8>(), 0..20),
            queries in prop::collection::vec("[a-z]{1,4}:[a-zé:]{0,4}", 0..6), cut in 0usize..40,
        ) {
            let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
            let data = encode(&export, &queries);
            let request = ContextRequest::parse(&data).unwrap();
            prop_assert_eq!(encode(request.export, &request.queries), data.clone());
            if cut < data.len() {
                prop_assert!(ContextRequest::parse(&data[..cut]).is_err());
            }
        }

        #[test]
        fn any_bytes_are_understood_or_refused(data in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(request) = ContextRequest::parse(&data) {
                prop_assert_eq!(encode(request.export, &request.queries), data);
            }
        }
    }
}
