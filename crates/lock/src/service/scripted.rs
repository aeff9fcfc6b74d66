//! A lock service whose every answer and call is a test's: a race becomes a script.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinfold_base::Errno;

use super::{Events, JoinError, LockService, Name, Reply, Session, Token, Wait};
use crate::clock::Time;
use crate::mode::Mode;

/// How long a script waits for a node's next request before it calls that a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request as the service sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// By which member.
    pub member: String,
    /// Which lock.
    pub name: Name,
    /// From which mode.
    pub from: Mode,
    /// To which.
    pub to: Mode,
    /// What if it cannot be granted at once.
    pub wait: Wait,
}

/// The script's end of the service.
#[derive(Clone, Default)]
pub struct Scripted {
    stage: Arc<Stage>,
}

#[derive(Default)]
struct Stage {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    members: Vec<(String, Weak<dyn Events>)>,
    asked: VecDeque<Asked>,
    good_until: Option<Time>,
    gone: Vec<(String, &'static str)>,
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scripted")
            .field("asked", &self.stage.state.lock().asked)
            .finish_non_exhaustive()
    }
}

impl Scripted {
    /// A service without members.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits for the next request of any member.
    ///
    /// # Panics
    /// When none comes within a minute.
    #[must_use]
    pub fn next(&self) -> Asked {
        let end = Instant::now() + PATIENCE;
        let mut state = self.stage.state.lock();
        loop {
            if let Some(asked) = state.asked.pop_front() {
                return asked;
            }
            let late = self.stage.changed.wait_until(&mut state, end).timed_out();
            assert!(!late || !state.asked.is_empty(), "no request comes");
        }
    }

    /// The requests that nobody looked at yet.
    #[must_use]
    pub fn unseen(&self) -> Vec<Asked> {
        self.stage.state.lock().asked.iter().cloned().collect()
    }

    /// Grants what was asked.
    pub fn grant(&self, asked: &Asked, token: u64) {
        let reply = Reply::Granted {
            mode: asked.to,
            token: Token(token),
        };
        self.reply(&asked.member, asked.name, reply);
    }

    /// Waits for a request, checks it and grants it.
    ///
    /// # Panics
    /// When another request comes, or none.
    pub fn expect_and_grant(&self, member: &str, from: Mode, to: Mode) -> Asked {
        let asked = self.next();
        assert_eq!(
            (asked.member.as_str(), asked.from, asked.to),
            (member, from, to)
        );
        self.grant(&asked, 1);
        asked
    }

    /// Answers in any way.
    pub fn reply(&self, member: &str, name: Name, reply: Reply) {
        self.events(member).reply(name, reply);
    }

    /// Calls a member to give way.
    pub fn demote(&self, member: &str, name: Name, wanted: Mode) {
        self.events(member).demote(name, wanted);
    }

    /// Begins a recovery at a member.
    pub fn freeze(&self, member: &str, generation: u64) {
        self.events(member).freeze(generation);
    }

    /// Ends one.
    pub fn thaw(&self, member: &str, generation: u64) {
        self.events(member).thaw(generation);
    }

    /// Tells a member that it is none any more.
    pub fn lose(&self, member: &str, errno: Errno) {
        self.events(member).lost(errno);
    }

    /// Sets until when members may use their locks.
    pub fn lease(&self, good_until: Time) {
        self.stage.state.lock().good_until = Some(good_until);
    }

    /// Which members are gone, and how: `"left"` or `"abandoned"`.
    #[must_use]
    pub fn gone(&self) -> Vec<(String, &'static str)> {
        self.stage.state.lock().gone.clone()
    }

    fn events(&self, member: &str) -> Arc<dyn Events> {
        let state = self.stage.state.lock();
        let found = state.members.iter().find(|(name, _)| name == member);
        found
            .and_then(|(_, events)| events.upgrade())
            .expect("the script speaks of a member that is there")
    }
}

impl LockService for Scripted {
    fn join(&self, member: &str, events: Weak<dyn Events>) -> Result<Box<dyn Session>, JoinError> {
        let mut state = self.stage.state.lock();
        state.members.push((member.to_owned(), events));
        Ok(Box::new(ScriptedSession {
            stage: Arc::clone(&self.stage),
            member: member.to_owned(),
        }))
    }
}

struct ScriptedSession {
    stage: Arc<Stage>,
    member: String,
}

impl fmt::Debug for ScriptedSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ScriptedSession({})", self.member)
    }
}

impl ScriptedSession {
    fn go(&self, how: &'static str) {
        let mut state = self.stage.state.lock();
        state.gone.push((self.member.clone(), how));
    }
}

impl Session for ScriptedSession {
    fn request(&self, name: Name, from: Mode, to: Mode, wait: Wait) {
        let asked = Asked {
            member: self.member.clone(),
            name,
            from,
            to,
            wait,
        };
        self.stage.state.lock().asked.push_back(asked);
        self.stage.changed.notify_all();
    }

    fn good_until(&self) -> Option<Time> {
        self.stage.state.lock().good_until
    }

    fn leave(&self) {
        self.go("left");
    }

    fn abandon(&self) {
        self.go("abandoned");
    }
}
