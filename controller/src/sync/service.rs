//! `SyncService`: messages in, requests to the host, answers out. Decodes, asks, encodes; decides nothing.
//!
//! Who speaks is an extension that the door has put into the request; what the message says of itself is never asked.

use std::{convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use millstream_common::{
    convert,
    id::{BarrierName, NameError, TaskId, TopicName},
    limits,
    sync_client::Parties,
};
use millstream_proto::v1::{self, sync_service_server::SyncService};
use prost::Message as _;
use tokio_stream::Stream;
use tonic::{
    Request, Response, Status,
    codegen::{BoxFuture, http},
};

use super::{
    CallId, Refusal, Speaker,
    barrier::{Arrival, Barrier, Connection, Decided},
    board::{self, Answer, IMPLICIT_TOKEN},
    host::{Line, SyncHost, WeakHost, roll},
    story,
    topic::{Content, Value, Wanted},
};

/// Who calls, as the door says.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// Who.
    pub(crate) speaker: Speaker,
    /// Through what it came, when that can break without the caller's doing.
    pub(crate) line: Option<Line>,
    /// The relay's number of the call: a repeat of the call has the same.
    pub(crate) call_id: Option<u64>,
}

impl Caller {
    /// By what a party or a publication is known again that gave no token: the repeat of its call after a broken link.
    fn implicit_token(&self) -> Option<Arc<str>> {
        self.call_id.map(|id| format!("{IMPLICIT_TOKEN}{id}").into())
    }
}

/// Another service for blocks, behind the same sockets.
pub(crate) trait BlockService: Send + Sync + std::fmt::Debug {
    /// Whether a call is one of its own.
    fn serves(&self, method: &str) -> bool;

    /// Answers a call of a task.
    fn call(
        self: Arc<Self>,
        task: TaskId,
        request: http::Request<tonic::body::Body>,
    ) -> BoxFuture<http::Response<tonic::body::Body>, Infallible>;
}

/// The service of one host.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    host: WeakHost,
}

impl Service {
    /// Serves a host without keeping it alive.
    pub(crate) fn new(host: &SyncHost) -> Self {
        Self { host: host.downgrade() }
    }

    fn host(&self) -> Result<SyncHost, Status> {
        self.host.upgrade().ok_or_else(gone)
    }

    /// Asks the board and waits for its answer.
    async fn ask(&self, caller: &Caller, request: board::Request) -> Result<Answer, Status> {
        let host = self.host()?;
        host.ask(caller.speaker, request, caller.line.as_ref()).await.ok_or_else(gone)
    }

    /// Enters a barrier for the relay, which encodes the answer itself: `reply` is given it, now or later.
    pub(crate) fn enter_with(
        &self,
        call: CallId,
        caller: &Caller,
        message: Bytes,
        reply: impl FnOnce(Result<Bytes, Status>) + Send + 'static,
    ) {
        let request = v1::EnterRequest::decode(message)
            .map_err(|error| Status::invalid_argument(format!("the message is no EnterRequest: {error}")))
            .and_then(|message| enter_request(caller, message))
            .and_then(|request| Ok((self.host()?, request)));
        match request {
            Err(status) => reply(Err(status)),
            Ok((host, request)) => {
                let answered = move |answer| match answer {
                    Answer::Released { decided, arrival } => reply(Ok(encoded_release(&decided, arrival))),
                    other => reply(Err(status(other))),
                };
                host.ask_with(call, caller.speaker, request, Box::new(answered));
            }
        }
    }

    /// The host, while it is there.
    pub(crate) fn upgrade(&self) -> Option<SyncHost> {
        self.host.upgrade()
    }

    /// Does what is answered with an empty message.
    async fn command(&self, caller: &Caller, request: board::Request) -> Result<(), Status> {
        match self.ask(caller, request).await? {
            Answer::Done => Ok(()),
            other => Err(status(other)),
        }
    }
}

/// Who speaks in a request, and its message.
fn take<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    let (_, mut extensions, message) = request.into_parts();
    let caller =
        extensions.remove::<Caller>().ok_or_else(|| Status::internal("the door did not say who calls"))?;
    Ok((caller, message))
}

#[tonic::async_trait]
impl SyncService for Service {
    async fn enter(&self, request: Request<v1::EnterRequest>) -> Result<Response<v1::EnterResponse>, Status> {
        let (caller, message) = take(request)?;
        match self.ask(&caller, enter_request(&caller, message)?).await? {
            Answer::Released { decided, arrival } => Ok(Response::new(enter_response(&decided, arrival))),
            other => Err(status(other)),
        }
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let (caller, v1::AbortRequest { name, reason }) = take(request)?;
        let barrier = barrier_name(&name)?;
        if reason.len() > limits::TEXT_BYTES_MAX || reason.contains('\n') {
            return Err(invalid("reason", "must be one line of at most 1 KiB"));
        }
        let reason = millstream_common::text::printable(reason.as_bytes(), limits::TEXT_BYTES_MAX);
        self.command(&caller, board::Request::Abort { barrier, reason }).await?;
        Ok(Response::new(v1::AbortResponse {}))
    }

    async fn reset(&self, request: Request<v1::ResetRequest>) -> Result<Response<v1::ResetResponse>, Status> {
        let (caller, message) = take(request)?;
        let barrier = barrier_name(&message.name)?;
        self.command(&caller, board::Request::Reset { barrier }).await?;
        Ok(Response::new(v1::ResetResponse {}))
    }

    async fn hold(&self, request: Request<v1::HoldRequest>) -> Result<Response<v1::HoldResponse>, Status> {
        let (caller, message) = take(request)?;
        let barrier = barrier_name(&message.name)?;
        self.command(&caller, board::Request::Hold { barrier, release: message.release }).await?;
        Ok(Response::new(v1::HoldResponse {}))
    }

    async fn list_barriers(
        &self,
        request: Request<v1::ListBarriersRequest>,
    ) -> Result<Response<v1::ListBarriersResponse>, Status> {
        let (_, v1::ListBarriersRequest { from_index }) = take(request)?;
        let mut page = Page::new(from_index);
        let barriers = self.host()?.with_barriers(page.from(), |barrier, missing, to_wall| {
            page.take(barrier_status(barrier, missing, to_wall))
        });
        Ok(Response::new(v1::ListBarriersResponse { barriers, next_index: page.next_index() }))
    }

    async fn publish(
        &self,
        request: Request<v1::PublishRequest>,
    ) -> Result<Response<v1::PublishResponse>, Status> {
        let (caller, v1::PublishRequest { topic, text, data, publish_token }) = take(request)?;
        let topic = topic_name(&topic)?;
        let content = match (text.is_empty(), data.is_empty()) {
            (_, true) => Content::Text(text),
            (true, false) => Content::Data(data),
            (false, false) => {
                return Err(invalid("text", "cannot stand together with `data`: send one of them"));
            }
        };
        let token = token("publish_token", publish_token)?.or_else(|| caller.implicit_token());
        match self.ask(&caller, board::Request::Publish { topic, content, token }).await? {
            Answer::Indexed(index) => Ok(Response::new(v1::PublishResponse { index })),
            other => Err(status(other)),
        }
    }

    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<v1::SubscribeResponse, Status>> + Send>>;

    async fn subscribe(
        &self,
        request: Request<v1::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let (caller, message) = take(request)?;
        let topic = topic_name(&message.topic)?;
        let v1::SubscribeRequest { from_index: next_index, once, .. } = message;
        let reader = Reader { service: self.clone(), caller, topic, next_index, once };
        Ok(Response::new(Box::pin(Batches { reader: Some(reader), next: None })))
    }

    async fn wait(&self, request: Request<v1::WaitRequest>) -> Result<Response<v1::WaitResponse>, Status> {
        let (caller, message) = take(request)?;
        let topic = topic_name(&message.topic)?;
        let count = u64::from(message.count.max(1));
        if count > limits::TOPIC_VALUES_COUNT_MAX as u64 {
            return Err(invalid("count", "must be 1 to 100,000, or zero for 1"));
        }
        let timeout = patience(message.timeout.as_ref())?;
        let wanted = Wanted::First(count);
        match self.ask(&caller, board::Request::Await { topic, wanted, timeout }).await? {
            Answer::Values(values) => Ok(Response::new(v1::WaitResponse {
                values: values.iter().map(|v| topic_value(v)).collect(),
            })),
            other => Err(status(other)),
        }
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        let (_, message) = take(request)?;
        let topic = topic_name(&message.topic)?;
        let values = self
            .host()?
            .with_topics(|topics| topics.values(&topic, message.from_index, limits::SYNC_ANSWER_BYTES_MAX));
        Ok(Response::new(v1::GetResponse { values: values.iter().map(|v| topic_value(v)).collect() }))
    }

    async fn list_topics(
        &self,
        request: Request<v1::ListTopicsRequest>,
    ) -> Result<Response<v1::ListTopicsResponse>, Status> {
        let (_, v1::ListTopicsRequest { from_index }) = take(request)?;
        let mut page = Page::new(from_index);
        let topics = self.host()?.with_topics(|topics| {
            let status = |(name, count, size_bytes): (&TopicName, u64, u64)| v1::TopicStatus {
                name: name.to_string(),
                count,
                size_bytes,
            };
            let rest = topics.list().skip(page.from());
            rest.map_while(|topic| page.take(status(topic))).collect()
        });
        Ok(Response::new(v1::ListTopicsResponse { topics, next_index: page.next_index() }))
    }
}

/// A subscription: it has seen what lies before the next index.
struct Reader {
    service: Service,
    caller: Caller,
    topic: TopicName,
    next_index: u64,
    /// Whether the first values are all that it wants, and nothing else is done meanwhile.
    once: bool,
}

impl Reader {
    /// The next values: at least one. Waits until there are some.
    async fn next(&mut self) -> Result<v1::SubscribeResponse, Status> {
        let wanted = if self.once { Wanted::Next } else { Wanted::From };
        let request = board::Request::Await {
            topic: self.topic.clone(),
            wanted: wanted(self.next_index),
            timeout: limits::WAIT_MAX,
        };
        match self.service.ask(&self.caller, request).await? {
            Answer::Values(values) => {
                self.next_index += values.len() as u64;
                Ok(v1::SubscribeResponse { values: values.iter().map(|v| topic_value(v)).collect() })
            }
            other => Err(status(other)),
        }
    }
}

type NextBatch = Pin<Box<dyn Future<Output = (Reader, Result<v1::SubscribeResponse, Status>)> + Send>>;

/// The batches of a subscription as a stream, which ends with the first error, or with the first batch when that is all.
struct Batches {
    reader: Option<Reader>,
    next: Option<NextBatch>,
}

impl Stream for Batches {
    type Item = Result<v1::SubscribeResponse, Status>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        if let Some(mut reader) = self.reader.take() {
            self.next = Some(Box::pin(async move {
                let batch = reader.next().await;
                (reader, batch)
            }));
        }
        let Some(next) = &mut self.next else { return std::task::Poll::Ready(None) };
        next.as_mut().poll(context).map(|(reader, batch)| {
            self.next = None;
            self.reader = (batch.is_ok() && !reader.once).then_some(reader);
            Some(batch)
        })
    }
}

/// What fits in one answer of a list: at least one, if there is one.
#[derive(Debug)]
pub(crate) struct Page {
    from_index: u32,
    taken: u32,
    size_bytes: usize,
    next_index: u32,
}

impl Page {
    /// An empty one, from an index on.
    pub(crate) fn new(from_index: u32) -> Self {
        Self { from_index, taken: 0, size_bytes: 0, next_index: 0 }
    }

    /// How many to leave out.
    pub(crate) fn from(&self) -> usize {
        usize::try_from(self.from_index).unwrap_or(usize::MAX)
    }

    /// Where the next answer begins; zero when this one has the last.
    pub(crate) fn next_index(&self) -> u32 {
        self.next_index
    }

    /// Puts one more on it; none when it is full.
    pub(crate) fn take<M: prost::Message>(&mut self, message: M) -> Option<M> {
        // Two bytes of tag and length more, or three for a long one.
        self.size_bytes += message.encoded_len() + 3;
        if self.taken > 0 && self.size_bytes > limits::SYNC_ANSWER_BYTES_MAX {
            self.next_index = self.from_index.saturating_add(self.taken);
            return None;
        }
        self.taken += 1;
        Some(message)
    }
}

fn gone() -> Status {
    Status::unavailable("controller gone: the test is over")
}

fn invalid(field: &'static str, problem: &str) -> Status {
    status(Answer::Refused(Refusal::Invalid { field, problem: problem.to_owned() }))
}

fn name_error(field: &str, error: &NameError) -> Status {
    Status::invalid_argument(format!("{field}: {error}"))
}

fn barrier_name(name: &str) -> Result<BarrierName, Status> {
    BarrierName::new(name).map_err(|error| name_error("name", &error))
}

fn topic_name(name: &str) -> Result<TopicName, Status> {
    TopicName::new(name).map_err(|error| name_error("topic", &error))
}

fn token(field: &'static str, token: String) -> Result<Option<Arc<str>>, Status> {
    if token.len() > limits::TOKEN_BYTES_MAX || token.chars().any(char::is_control) {
        return Err(invalid(field, "must have at most 64 bytes and no control characters"));
    }
    Ok((!token.is_empty()).then(|| token.into()))
}

fn patience(timeout: Option<&prost_types::Duration>) -> Result<Duration, Status> {
    let Some(timeout) = timeout else { return Ok(limits::BARRIER_TIMEOUT) };
    match Duration::try_from(*timeout) {
        Ok(timeout) if timeout <= limits::WAIT_MAX => Ok(timeout),
        _ => Err(invalid("timeout", "must be 0 s to 7 days")),
    }
}

fn enter_request(caller: &Caller, message: v1::EnterRequest) -> Result<board::Request, Status> {
    let v1::EnterRequest { name, parties, timeout, party_token, payload, display_name, all, more_parties } =
        message;
    if parties > limits::BARRIER_PARTIES_MAX {
        return Err(invalid("parties", "must be 1 to 100,000, or zero for the size of the group"));
    }
    let parties = match (parties, all, more_parties) {
        (0, false, more) => Parties::Group { more },
        (0, true, more) => Parties::All { more },
        (count, false, 0) => Parties::Count(count),
        _ => return Err(invalid("parties", "cannot stand together with `all` or `more_parties`")),
    };
    if payload.len() > limits::BARRIER_PAYLOAD_BYTES_MAX {
        return Err(status(Answer::Refused(Refusal::Full {
            what: format!("the payload for barrier `{name}` has {} bytes", payload.len()),
            limit: format!("{} bytes", limits::BARRIER_PAYLOAD_BYTES_MAX),
        })));
    }
    if display_name.len() > limits::TEXT_BYTES_MAX || display_name.chars().any(char::is_control) {
        return Err(invalid("display_name", "must have at most 1 KiB and no control characters"));
    }
    Ok(board::Request::Enter {
        barrier: barrier_name(&name)?,
        parties,
        timeout: patience(timeout.as_ref())?,
        token: token("party_token", party_token)?.or_else(|| caller.implicit_token()),
        payload,
        display_name: (!display_name.is_empty()).then_some(display_name),
    })
}

/// The same as a message, with the list of parties, which is the same for all of them, encoded once.
fn encoded_release(decided: &Decided, arrival: u32) -> Bytes {
    // Fields of a message may stand in any order, and repeated ones apart from each other: what differs comes first.
    let own = v1::EnterResponse {
        generation: decided.meeting.generation,
        arrival,
        parties: Vec::new(),
        wait_duration: Some(convert::duration(decided.waited(arrival))),
    };
    let shared = decided.encoded.get_or_init(|| {
        let parties = enter_response(decided, arrival).parties;
        v1::EnterResponse { parties, ..v1::EnterResponse::default() }.encode_to_vec().into()
    });
    let mut message = BytesMut::with_capacity(own.encoded_len() + shared.len());
    own.encode_raw(&mut message);
    message.put_slice(shared);
    message.freeze()
}

fn enter_response(decided: &Decided, arrival: u32) -> v1::EnterResponse {
    v1::EnterResponse {
        generation: decided.meeting.generation,
        arrival,
        parties: roll(decided)
            .map(|(number, party)| v1::Party {
                name: party.label.to_string(),
                arrival: number,
                payload: party.payload.clone(),
            })
            .collect(),
        wait_duration: Some(convert::duration(decided.waited(arrival))),
    }
}

fn topic_value(value: &Value) -> v1::TopicValue {
    let (text, data) = match &value.content {
        Content::Text(text) => (text.clone(), Bytes::new()),
        Content::Data(data) => (String::new(), data.clone()),
    };
    v1::TopicValue { index: value.index, text, data, publisher: value.publisher.to_string() }
}

fn barrier_status(
    barrier: &Barrier,
    missing: Vec<String>,
    to_wall: &dyn Fn(std::time::Instant) -> u64,
) -> v1::BarrierStatus {
    let state = match (barrier.broken().is_some(), barrier.is_held(), barrier.meeting().is_some()) {
        (true, _, _) => "broken",
        (false, true, _) => "held",
        (false, false, true) => "waiting",
        (false, false, false) => "idle",
    };
    let arrivals = barrier.meeting().map_or(&[][..], |meeting| &meeting.arrivals);
    let mut names_bytes = 0;
    let fits = |arrival: &&Arrival| {
        names_bytes += arrival.label.len();
        names_bytes <= limits::ARRIVALS_LISTED_BYTES_MAX
    };
    v1::BarrierStatus {
        name: barrier.name().to_string(),
        generation: barrier.generation(),
        state: state.to_owned(),
        parties: barrier.meeting().map_or(0, |meeting| meeting.parties),
        arrivals: arrivals
            .iter()
            .take(limits::ARRIVALS_LISTED_COUNT_MAX)
            .take_while(fits)
            .map(|arrival| v1::BarrierArrival {
                name: arrival.label.to_string(),
                enter_time: Some(convert::timestamp(to_wall(arrival.entered))),
                timeout_time: Some(convert::timestamp(to_wall(arrival.deadline))),
                connected: arrival.connection == Connection::Up,
            })
            .collect(),
        missing,
        broken: barrier.broken().map_or_else(String::new, |cause| cause.sentence.clone()),
    }
}

/// What a caller is told instead of what it asked for: the one place where refusals become status codes.
fn status(answer: Answer) -> Status {
    match answer {
        Answer::Broken { decided, arrival } => Status::aborted(story::broken(&decided, arrival)),
        Answer::GivenUp(told) => Status::aborted(told),
        Answer::TimedOut(told) => Status::deadline_exceeded(told),
        Answer::Refused(refusal) => {
            let told = refusal.to_string();
            match refusal {
                Refusal::Invalid { .. } => Status::invalid_argument(told),
                Refusal::TokenTaken { .. } => Status::already_exists(told),
                Refusal::Full { .. } => Status::resource_exhausted(told),
                Refusal::NotForBlocks { .. } => Status::permission_denied(told),
                Refusal::NotATask { .. } => Status::failed_precondition(told),
                Refusal::Superseded => Status::cancelled(told),
            }
        }
        Answer::Released { .. } | Answer::Indexed(_) | Answer::Values(_) | Answer::Done => {
            Status::internal("the board answered another question")
        }
    }
}
