//! Many tests at a few hosts that are given in the order of asking: whatever they want and hold, all come to their end.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// Between two looks of a waiting test at its place, and between two words of a host about who waits.
const STEP: Duration = Duration::from_secs(5);
/// How long tests are ready to wait: so long that a circle would show.
const WAIT: Duration = Duration::from_secs(24 * 3600);
const PLACES: [&str; 4] = ["tls://a", "tls://b", "tls://c", "tls://d"];

/// One wish of a test: a host, and whether it is to be reserved.
type Wish = (usize, bool);

/// A test that takes one host after another in the order of its wishes, and ends once each was had or given up.
struct Party {
    wishes: Vec<Wish>,
    /// Its next wish.
    next: usize,
    had: Vec<Wish>,
    holdings: Holdings,
    line: Option<Line>,
    gave_up: usize,
}

#[derive(Default)]
struct Host {
    holders: Vec<(usize, bool)>,
    line: VecDeque<(usize, bool)>,
}

impl Host {
    /// Gives the host in the order of asking, as agents do.
    fn give(&mut self) -> Vec<usize> {
        let mut given = Vec::new();
        while let Some(&(party, exclusive)) = self.line.front() {
            if self.holders.iter().any(|&(_, other)| exclusive || other) {
                break;
            }
            self.line.pop_front();
            self.holders.push((party, exclusive));
            given.push(party);
        }
        given
    }
}

/// Lets tests live until all have ended; how many steps it took, and how many wishes were given up.
fn live(wishes: Vec<Vec<Wish>>, start: Instant) -> Option<(u32, usize)> {
    let party = |wishes| Party {
        wishes,
        next: 0,
        had: Vec::new(),
        holdings: Holdings::default(),
        line: None,
        gave_up: 0,
    };
    let mut parties: Vec<Party> = wishes.into_iter().map(party).collect();
    let mut hosts: Vec<Host> = PLACES.iter().map(|_| Host::default()).collect();
    for step in 0..10_000 {
        let now = start + STEP * step;
        if parties.iter().all(|party| party.next > party.wishes.len()) {
            return Some((step, parties.iter().map(|party| party.gave_up).sum()));
        }
        for (number, party) in parties.iter_mut().enumerate() {
            for &(host, _) in &party.had {
                let count = u32::try_from(hosts[host].line.len()).unwrap();
                party.holdings.wanted(PLACES[host], count, now);
            }
            let Some(&(host, exclusive)) = party.wishes.get(party.next) else {
                // It has all that it could have, and ends.
                for (host, _) in std::mem::take(&mut party.had) {
                    party.holdings.let_go(PLACES[host]);
                    hosts[host].holders.retain(|&(holder, _)| holder != number);
                }
                party.next = party.wishes.len() + 1;
                continue;
            };
            match &party.line {
                None => {
                    party.line = Some(Line::begin(now, WAIT, false));
                    hosts[host].line.push_back((number, exclusive));
                }
                Some(line) => {
                    if line.over(PLACES[host], &party.holdings, "", now).is_some() {
                        hosts[host].line.retain(|&(waiting, _)| waiting != number);
                        party.line = None;
                        party.gave_up += 1;
                        party.next += 1;
                    }
                }
            }
        }
        for (host, state) in hosts.iter_mut().enumerate() {
            for number in state.give() {
                let party = &mut parties[number];
                party.had.push(party.wishes[party.next]);
                party.holdings.hold(PLACES[host]);
                party.line = None;
                party.next += 1;
            }
        }
    }
    None
}

/// Each host at most once.
fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    prop::sample::subsequence((0..PLACES.len()).collect::<Vec<_>>(), 1..=PLACES.len())
        .prop_shuffle()
        .prop_flat_map(|hosts| {
            let count = hosts.len();
            (Just(hosts), prop::collection::vec(any::<bool>(), count))
        })
        .prop_map(|(hosts, exclusive)| hosts.into_iter().zip(exclusive).collect())
}

/// A moment to count from; no real time passes.
fn beginning() -> Instant {
    Instant::now()
}

proptest! {
    #[test]
    fn nobody_waits_for_ever_whatever_is_wanted_in_whatever_order(
        wishes in prop::collection::vec(wishes(), 2..6)
    ) {
        let Some((steps, _)) = live(wishes, beginning()) else {
            return Err(TestCaseError::fail("tests wait for each other"));
        };
        // At worst each gives up once for each of its hosts, after half a minute and two looks.
        prop_assert!(STEP * steps < WAIT / 10, "{steps}");
    }

    #[test]
    fn whoever_keeps_the_order_gets_all_it_wants(wishes in prop::collection::vec(wishes(), 2..6)) {
        let in_order = |mut wishes: Vec<Wish>| { wishes.sort_unstable(); wishes };
        let lived = live(wishes.into_iter().map(in_order).collect(), beginning());
        prop_assert_eq!(lived.map(|(_, gave_up)| gave_up), Some(0));
    }
}

#[test]
fn two_tests_with_opposite_orders_are_untied_by_the_one_that_waits_against_the_order() {
    let (reserved, shared) = (true, false);
    for kinds in [[reserved; 4], [reserved, shared, reserved, shared], [shared, reserved, shared, reserved]] {
        let lived =
            live(vec![vec![(0, kinds[0]), (1, kinds[1])], vec![(1, kinds[2]), (0, kinds[3])]], beginning());
        assert_eq!(lived.map(|(_, gave_up)| gave_up), Some(1), "{kinds:?}");
    }
}

#[test]
fn nobody_gives_up_for_a_host_that_nobody_else_wants() {
    let (begin, holdings) = (beginning(), Holdings::default());
    let line = Line::begin(begin, Duration::from_secs(600), false);
    holdings.hold("tls://b");
    let over =
        |seconds| line.over("tls://a", &holdings, "it is reserved", begin + Duration::from_secs(seconds));
    assert_eq!(over(599), None);
    assert_eq!(
        over(600).unwrap(),
        "tls://a could not be had within 10 min 0 s: it is reserved. Give the stream a longer `wait`, or run the test when the host is free"
    );
    // From the first word on, and not anew with each.
    holdings.wanted("tls://b", 1, begin + Duration::from_secs(100));
    holdings.wanted("tls://b", 2, begin + Duration::from_secs(110));
    assert_eq!(over(129), None);
    let told = over(130).unwrap();
    assert!(told.contains("This test holds tls://b") && told.contains("`take_together`"), "{told}");
    holdings.wanted("tls://b", 0, begin + Duration::from_secs(131));
    assert_eq!(over(132), None);
    // What comes earlier in the order than the host that is waited for is in nobody's way for ever.
    holdings.wanted("tls://b", 1, begin);
    assert_eq!(line.over("tls://c", &holdings, "", begin + Duration::from_secs(300)), None);
}

#[test]
fn a_block_is_told_why_it_waits_for_a_moment_only() {
    let begin = Instant::now();
    let line = Line::begin(begin, limits::REACH_MAX, true);
    assert_eq!(line.over("tls://a", &Holdings::default(), "", begin + Duration::from_secs(29)), None);
    let told =
        line.over("tls://a", &Holdings::default(), "reserved by alice", begin + limits::REACH_MAX).unwrap();
    assert_eq!(
        told,
        "tls://a could not be had within 30 s: reserved by alice. A block waits no longer, whatever `wait` says, because its own \
         test may be in the way of whom it waits for: run the test when the host is free"
    );
}
