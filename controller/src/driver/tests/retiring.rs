//! Single streams that are closed while the test goes on.

use std::sync::atomic::Ordering;

use super::{Fake, Lab, explaining::check, lab, word};
use crate::{Definition, OutcomeKind, Ready, Reason, Stream};

impl Lab {
    fn stream(&self, name: &str) -> Stream {
        self.streams.get(name).unwrap()
    }

    /// Another stream at the place of the others.
    fn add(&self, name: &str) -> Stream {
        let place = self.stream("a").definition();
        self.streams.add(name, Definition::url(place)).unwrap()
    }
}

/// Sessions that were opened and closed.
fn sessions(fake: &Fake) -> (u64, usize) {
    let state = fake.lock();
    (state.epoch, state.closed)
}

#[tokio::test]
async fn a_closed_stream_ends_its_tasks_and_takes_no_more() {
    let lab = lab();
    let (a, b) = (lab.stream("a"), lab.stream("b"));
    let (running, held) = (a.run_bg(word("hang")), a.prepare(word("true")));
    let (waiting, other) = (a.run_bg(word("hang")), b.run_bg(word("hang")));
    running.ready(Ready::log("hang")).await.unwrap();
    other.ready(Ready::log("hang")).await.unwrap();
    a.close().await.unwrap();
    let end = |task: &crate::Task| {
        let outcome = task.try_outcome().expect("closing waits for the ends of all tasks");
        (outcome.kind, outcome.reason)
    };
    assert_eq!(end(&running), (OutcomeKind::Stopped, Reason::SessionClosed));
    assert_eq!(end(held.task()), (OutcomeKind::Cancelled, Reason::SessionClosed));
    // The host has it already, and may have begun it before it was told.
    assert_eq!(end(&waiting).1, Reason::SessionClosed);
    let late = a.run_bg(word("true")).outcome().await;
    let told = (late.kind, late.reason, late.detail.as_str());
    let never = "its stream was closed before it began";
    assert_eq!(told, (OutcomeKind::Cancelled, Reason::SessionClosed, never));
    a.close().await.unwrap();
    assert!(other.try_outcome().is_none());
    assert_eq!(sessions(&lab.fake), (1, 0), "another stream is at its place");
    other.stop().await;
    lab.streams.wait().await.unwrap();
    b.close().await.unwrap();
    assert_eq!(sessions(&lab.fake), (1, 1));
    lab.streams.close().await.unwrap();
    assert_eq!(sessions(&lab.fake), (1, 1));
}

#[tokio::test]
async fn streams_are_closed_in_any_order_and_their_place_is_used_again() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for order in orders {
        let lab = lab();
        let streams = [lab.stream("a"), lab.stream("b"), lab.add("c")];
        // One that is used and over, one that runs, one that nobody uses.
        streams[0].run_fg(word("true")).await.unwrap();
        streams[1].run_bg(word("hang")).ready(Ready::log("hang")).await.unwrap();
        for stream in order {
            streams[stream].close().await.unwrap();
        }
        assert_eq!(sessions(&lab.fake), (1, 1), "{order:?}");
        let again = lab.add("d");
        assert!(again.run_fg(word("true")).await.unwrap().passed());
        assert_eq!(sessions(&lab.fake), (2, 1), "{order:?}");
        lab.streams.close().await.unwrap();
        assert_eq!(sessions(&lab.fake), (2, 2), "{order:?}");
    }
}

#[tokio::test]
async fn a_stream_that_comes_while_the_last_one_is_closed_has_a_session_of_its_own() {
    let lab = lab();
    let mut last = lab.stream("a");
    for round in 0..30 {
        last.run_fg(word("true")).await.unwrap();
        let next = lab.add(&format!("next-{round}"));
        let work = async {
            // Before, while and after the session is closed.
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            next.run_fg(word("true")).await
        };
        let (closed, ran) = tokio::join!(last.close(), work);
        closed.unwrap();
        assert!(ran.unwrap().passed());
        last = next;
    }
    let (opened, closed) = sessions(&lab.fake);
    assert!(opened > 1, "the place was never left");
    assert_eq!(usize::try_from(opened).unwrap(), closed + 1);
    lab.streams.close().await.unwrap();
}

#[tokio::test]
async fn a_stream_whose_host_does_not_answer_is_closed_at_once() {
    let lab = lab();
    lab.fake.shared.unreachable.store(true, Ordering::SeqCst);
    let (a, b) = (lab.stream("a"), lab.stream("b"));
    let task = a.run_bg(word("true"));
    a.close().await.unwrap();
    assert_eq!(task.outcome().await.reason, Reason::SessionClosed);
    lab.fake.shared.unreachable.store(false, Ordering::SeqCst);
    assert!(b.run_fg(word("true")).await.unwrap().passed());
    lab.streams.close().await.unwrap();
    assert_eq!(sessions(&lab.fake), (1, 1));
}

#[tokio::test]
async fn closing_the_test_ends_what_is_being_closed() {
    let lab = lab();
    let a = lab.stream("a");
    let task = a.run_bg(word("deaf"));
    task.ready(Ready::log("deaf")).await.unwrap();
    let closing = tokio::spawn({
        let a = a.clone();
        async move { a.close().await }
    });
    check(
        &task,
        "task 1-deaf on stream a was told to stop N s ago on fake, because its stream is being closed; its last line: \
         `deaf`",
    )
    .await;
    lab.streams.close().await.unwrap();
    closing.await.unwrap().unwrap();
    assert_eq!(task.outcome().await.reason, Reason::SessionClosed);
}

#[tokio::test]
async fn streams_of_one_place_are_closed_at_once() {
    let lab = lab();
    let (a, b, c) = (lab.stream("a"), lab.stream("b"), lab.add("c"));
    for stream in [&a, &b, &c] {
        stream.run_bg(word("hang")).ready(Ready::log("hang")).await.unwrap();
    }
    let (first, second, third) = tokio::join!(a.close(), b.close(), c.close());
    first.and(second).and(third).unwrap();
    assert_eq!(sessions(&lab.fake), (1, 1));
    lab.streams.close().await.unwrap();
    assert_eq!(sessions(&lab.fake), (1, 1));
}
