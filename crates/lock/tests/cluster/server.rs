//! An etcd of a test's own, and a line to it that can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a server may take to answer on a busy machine.
const START: Duration = Duration::from_secs(60);

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// One etcd server; it ends with the value.
pub struct Server {
    child: Child,
    directory: tempfile::TempDir,
    client: u16,
    peer: u16,
}

impl Server {
    pub fn start() -> Self {
        let mut directory = tempfile::tempdir().unwrap();
        // Another test may take a port between the look at it and the server's: then it ends, and others are taken.
        for _ in 0..10 {
            let (client, peer) = (free_port(), free_port());
            let child = spawn(&directory, client, peer);
            let mut server = Self {
                child,
                directory,
                client,
                peer,
            };
            if server.answers() {
                return server;
            }
            directory = tempfile::tempdir().unwrap();
        }
        panic!("etcd does not start: is etcd-server installed?");
    }

    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client)
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn start_again(&mut self) {
        self.child = spawn(&self.directory, self.client, self.peer);
        assert!(self.answers(), "etcd does not start again");
    }

    fn answers(&mut self) -> bool {
        let end = Instant::now() + START;
        while Instant::now() < end {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if self.ctl(&["get", "nothing"]).is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    fn ctl(&self, arguments: &[&str]) -> Option<String> {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoint()])
            .args(arguments)
            .stderr(Stdio::null())
            .output()
            .expect("etcdctl is installed (Debian: etcd-client)");
        let text = String::from_utf8(output.stdout).unwrap();
        output.status.success().then_some(text)
    }

    fn must(&self, arguments: &[&str]) -> String {
        self.ctl(arguments).expect("etcdctl is answered")
    }

    pub fn put(&self, key: &str, value: &str) {
        // A value of nothing would be read from the standard input.
        self.must(&["put", "--", key, value]);
    }

    pub fn delete(&self, key: &str) {
        assert_eq!(self.must(&["del", key]).trim(), "1", "{key} is there");
    }

    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let text = self.must(&["get", "--prefix", "--keys-only", prefix]);
        let lines = text.lines().filter(|line| !line.is_empty());
        lines.map(str::to_owned).collect()
    }

    pub fn revision(&self) -> String {
        let text = self.must(&["get", "nothing", "-w", "json"]);
        let (_, rest) = text.split_once("\"revision\":").unwrap();
        rest.chars().take_while(char::is_ascii_digit).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(directory: &tempfile::TempDir, client: u16, peer: u16) -> Child {
    let client = format!("http://127.0.0.1:{client}");
    let peer = format!("http://127.0.0.1:{peer}");
    Command::new("etcd")
        .arg("--data-dir")
        .arg(directory.path().join("data"))
        .args(["--listen-client-urls", &client])
        .args(["--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer])
        .args(["--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("etcd is installed (Debian: etcd-server)")
}

/// A port that leads to a server until it is cut.
pub struct Cut {
    port: u16,
    line: Arc<Mutex<Line>>,
}

#[derive(Default)]
struct Line {
    cut: bool,
    streams: Vec<TcpStream>,
}

impl Cut {
    pub fn before(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let line = Arc::new(Mutex::new(Line::default()));
        let to = server.endpoint();
        let ours = Arc::clone(&line);
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let mut line = ours.lock();
                if line.cut {
                    continue;
                }
                let Ok(far) = TcpStream::connect(&to) else {
                    continue;
                };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    line.streams.push(from.try_clone().unwrap());
                    std::thread::spawn(move || pump(from, to));
                }
            }
        });
        Self { port, line }
    }

    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn cut(&self) {
        let mut line = self.line.lock();
        line.cut = true;
        for stream in line.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub fn mend(&self) {
        self.line.lock().cut = false;
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16384];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
