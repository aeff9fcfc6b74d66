//! An etcd of a test's own, and a line to it that can be cut.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pinfold_lock::service::etcd::Tls;

/// How long a server may take to answer on a busy machine.
const START: Duration = Duration::from_secs(60);

/// An address of loopback that no other test has: what one of them finds free stays free.
pub fn own_host() -> Ipv4Addr {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let turn = LAST.fetch_add(1, Ordering::Relaxed) % 2;
    // Process numbers have 22 bits; 127.0.x.y is left to others.
    let first = 0x80 | (high & 0x3f) | if turn == 1 { 0x40 } else { 0 };
    Ipv4Addr::new(127, first, middle, low)
}

/// A port of that address that was free a moment ago.
pub fn free_port(host: Ipv4Addr) -> u16 {
    let listener = TcpListener::bind((host, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// One etcd server; it ends with the value.
pub struct Server {
    child: Child,
    /// As whom etcdctl speaks.
    user: Mutex<Option<String>>,
    ways: Ways,
    directory: tempfile::TempDir,
    host: Ipv4Addr,
    client: u16,
    peer: u16,
}

/// How a server speaks with its clients.
#[derive(Clone, Copy, Default)]
struct Ways {
    /// With whom its authority vouches for alone.
    secure: bool,
    /// The tokens that it gives users name the state of its users and roles (JWT).
    dated_tokens: bool,
}

impl Server {
    pub fn start() -> Self {
        Self::start_as(Ways::default())
    }

    /// One that speaks with whom its authority vouches for alone.
    pub fn start_secure() -> Self {
        Self::start_as(Ways {
            secure: true,
            ..Ways::default()
        })
    }

    /// One that refuses tokens given before anything of its users and roles was changed.
    pub fn start_with_dated_tokens() -> Self {
        Self::start_as(Ways {
            dated_tokens: true,
            ..Ways::default()
        })
    }

    fn start_as(ways: Ways) -> Self {
        let mut directory = tempfile::tempdir().unwrap();
        let host = own_host();
        // A connection of the machine's may take a port between the look at it and the server's: then others are taken.
        for _ in 0..10 {
            let (client, peer) = (free_port(host), free_port(host));
            if ways.secure {
                make_certificates(directory.path(), host);
            }
            if ways.dated_tokens {
                openssl(
                    directory.path(),
                    "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out jwt.key",
                );
                openssl(directory.path(), "pkey -in jwt.key -pubout -out jwt.pub");
            }
            let child = spawn(&directory, (host, client, peer), ways);
            let mut server = Self {
                child,
                user: Mutex::new(None),
                ways,
                directory,
                host,
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
        format!("{}:{}", self.host, self.client)
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn start_again(&mut self) {
        self.start_unasked();
        assert!(self.answers(), "etcd does not start again");
    }

    /// Starts again, and does not wait until it answers.
    pub fn start_unasked(&mut self) {
        self.child = spawn(
            &self.directory,
            (self.host, self.client, self.peer),
            self.ways,
        );
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
        self.ctl_told(arguments, "")
    }

    /// Runs etcdctl with something on its standard input.
    fn ctl_told(&self, arguments: &[&str], input: &str) -> Option<String> {
        let mut command = Command::new("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoint()])
            // A busy machine is not a dead server.
            .args(["--command-timeout", "60s", "--dial-timeout", "60s"]);
        if let Some(user) = &*self.user.lock() {
            command.args(["--user", user]);
        }
        if self.ways.secure {
            let file = |name: &str| self.directory.path().join(name);
            command
                .arg("--cacert")
                .arg(file("ca.pem"))
                .arg("--cert")
                .arg(file("cert.pem"))
                .arg("--key")
                .arg(file("key.pem"));
        }
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcdctl is installed (Debian: etcd-client)");
        if let Some(mut to) = child.stdin.take() {
            // One that reads nothing may have ended by now.
            let _ = to.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        output.status.success().then_some(text)
    }

    fn must(&self, arguments: &[&str]) -> String {
        let answer = self.ctl(arguments);
        answer.unwrap_or_else(|| panic!("etcdctl {arguments:?} fails"))
    }

    /// From now on only who is known may do what it may.
    pub fn require_user(&self, name: &str, password: &str) {
        self.must(&["user", "add", &format!("{name}:{password}")]);
        self.must(&["user", "grant-role", name, "root"]);
        self.must(&["auth", "enable"]);
        *self.user.lock() = Some(format!("{name}:{password}"));
    }

    /// Makes a user that may do everything with keys that begin so.
    pub fn add_user(&self, name: &str, password: &str, prefix: &str) {
        self.must(&["user", "add", &format!("{name}:{password}")]);
        self.must(&["role", "add", name]);
        self.must(&[
            "role",
            "grant-permission",
            name,
            "--prefix=true",
            "readwrite",
            prefix,
        ]);
        self.must(&["user", "grant-role", name, name]);
    }

    /// Takes that away again.
    pub fn revoke(&self, name: &str, prefix: &str) {
        self.must(&["role", "revoke-permission", name, "--prefix=true", prefix]);
    }

    /// Adds a role that nobody has.
    pub fn add_role(&self, name: &str) {
        self.must(&["role", "add", name]);
    }

    /// Gives a user another password; what it was told before counts no more.
    pub fn change_password(&self, name: &str, password: &str) {
        let arguments = ["user", "passwd", name, "--interactive=false"];
        let answer = self.ctl_told(&arguments, &format!("{password}\n"));
        assert!(answer.is_some(), "etcdctl {arguments:?} fails");
    }

    /// What a client of a secure server needs.
    pub fn tls(&self) -> Tls {
        self.tls_with("cert.pem")
    }

    /// The same with a certificate whose time is over.
    pub fn tls_expired(&self) -> Tls {
        self.tls_with("expired.pem")
    }

    fn tls_with(&self, certificate: &str) -> Tls {
        let read = |name: &str| std::fs::read(self.directory.path().join(name)).unwrap();
        Tls {
            authority: Some(read("ca.pem")),
            identity: Some((read(certificate), read("key.pem"))),
            domain: None,
        }
    }

    /// The time of the server's own certificate ends: it shows this one to whoever connects from now on, etcdctl too.
    pub fn expire(&self) {
        let file = |name: &str| self.directory.path().join(name);
        std::fs::rename(file("expired.pem"), file("cert.pem")).unwrap();
    }

    pub fn put(&self, key: &str, value: &str) {
        // A value of nothing would be read from the standard input.
        self.must(&["put", "--", key, value]);
    }

    pub fn delete(&self, key: &str) {
        assert_eq!(self.must(&["del", key]).trim(), "1", "{key} is there");
    }

    pub fn delete_all(&self, prefix: &str) {
        self.must(&["del", "--prefix", prefix]);
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

fn spawn(
    directory: &tempfile::TempDir,
    (host, client, peer): (Ipv4Addr, u16, u16),
    ways: Ways,
) -> Child {
    let scheme = if ways.secure { "https" } else { "http" };
    let client = format!("{scheme}://{host}:{client}");
    let peer = format!("http://{host}:{peer}");
    let mut command = Command::new("etcd");
    let file = |name: &str| directory.path().join(name);
    if ways.dated_tokens {
        let (public, private) = (file("jwt.pub"), file("jwt.key"));
        command.args([
            "--auth-token",
            &format!(
                "jwt,pub-key={},priv-key={},sign-method=RS256",
                public.display(),
                private.display()
            ),
        ]);
    }
    if ways.secure {
        command
            .arg("--client-cert-auth")
            .arg("--trusted-ca-file")
            .arg(file("ca.pem"))
            .arg("--cert-file")
            .arg(file("cert.pem"))
            .arg("--key-file")
            .arg(file("key.pem"));
    }
    command
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

fn openssl(directory: &std::path::Path, arguments: &str) {
    let status = Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(directory)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .expect("openssl is installed");
    assert!(status.success(), "openssl {arguments}");
}

/// Makes an authority, and a certificate of it for both ends of loopback.
fn make_certificates(directory: &std::path::Path, host: Ipv4Addr) {
    let openssl = |arguments: &str| openssl(directory, arguments);
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!(
        "req -x509 {key} -days 2 -subj /CN=authority -keyout ca.key -out ca.pem"
    ));
    openssl(&format!(
        "req {key} -subj /CN=node -keyout key.pem -out request.pem"
    ));
    std::fs::write(
        directory.join("names"),
        format!("subjectAltName=IP:{host},IP:127.0.0.1\n"),
    )
    .unwrap();
    for (certificate, days) in [("cert", 2), ("expired", -1)] {
        openssl(&format!(
            "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days {days} -extfile names \
             -out {certificate}.pem"
        ));
    }
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
