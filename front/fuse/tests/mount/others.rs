//! Other users: what they may do, and whose their files are.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::support::{installed, is_root, mounted};

const UID: u32 = 54_321;
const GID: u32 = 54_322;

/// Runs a shell script in `dir` as somebody else, who is in no other group; returns what it prints, and whether it failed.
fn as_other(dir: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .uid(UID)
        .gid(GID)
        .output()
        .unwrap();
    let failed = !output.status.success();
    format!(
        "{}failed: {failed}",
        String::from_utf8_lossy(&output.stdout)
    )
}

/// Prepared as root, in the plain directory and on the mount alike.
fn prepare(dir: &Path) {
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(dir, 0o777);
    for (name, bits) in [
        ("open", 0o777),
        ("sticky", 0o1777),
        ("setgid", 0o2777),
        ("closed", 0o700),
    ] {
        let path = dir.join(name);
        fs::create_dir(&path).unwrap();
        if name == "setgid" {
            std::os::unix::fs::chown(&path, None, Some(777)).unwrap();
        }
        mode(&path, bits);
    }
    for (name, bits) in [
        ("readable", 0o644),
        ("secret", 0o600),
        ("writable", 0o666),
        ("drop", 0o622),
    ] {
        let path = dir.join(name);
        fs::write(&path, "contents\n").unwrap();
        mode(&path, bits);
    }
    fs::write(dir.join("sticky/roots"), "").unwrap();
    fs::write(dir.join("suid"), "#!/bin/true\n").unwrap();
    mode(&dir.join("suid"), 0o6777);
    fs::write(dir.join("suid2"), "0123456789").unwrap();
    mode(&dir.join("suid2"), 0o6777);
}

const SHOW: &str = "stat -c '%n %a %u %g %s'";

#[test]
fn others_may_do_what_they_may_on_a_plain_directory() {
    let Some(fixture) = mounted() else { return };
    if !is_root() {
        return;
    }
    prepare(&fixture.plain);
    prepare(&fixture.mnt);
    for script in [
        format!("umask 022; echo x > open/f && {SHOW} open/f"),
        format!(
            "umask 077; echo x > open/g && mkdir open/d && ln -s f open/l && {SHOW} open/g open/d open/l"
        ),
        format!("umask 002; echo x > setgid/f && mkdir setgid/d && {SHOW} setgid/f setgid/d"),
        "cat readable".into(),
        "cat secret".into(),
        "echo more >> readable".into(),
        "echo more >> writable && cat writable".into(),
        "echo more >> drop".into(),
        "cat drop".into(),
        "cat closed/f; ls closed".into(),
        "echo > closed/f".into(),
        "rm -f sticky/roots".into(),
        "echo x > sticky/mine && rm sticky/mine".into(),
        "mv sticky/roots sticky/moved".into(),
        "rm open/f && ls open".into(),
        "chmod 600 readable".into(),
        "touch -d 2001-01-01 readable".into(),
        "touch writable".into(),
        "chown 0 open/g".into(),
        "chmod 2755 open/g && stat -c %a open/g".into(),
        format!("echo more >> suid; {SHOW} suid"),
        format!("truncate -s 5 suid2; {SHOW} suid2"),
        "ln secret open/hard && stat -c %h secret".into(),
        "mkfifo open/p && stat -c '%F %a' open/p".into(),
        "mknod open/dev c 1 3".into(),
    ] {
        let (plain, mounted) = (
            as_other(&fixture.plain, &script),
            as_other(&fixture.mnt, &script),
        );
        assert_eq!(plain, mounted, "{script}");
    }
}

#[test]
fn default_acls_override_the_umask() {
    let Some(fixture) = mounted() else { return };
    if !is_root() || !installed("setfacl") {
        return;
    }
    let script = format!(
        "umask 077; setfacl -m u:1:rx open && setfacl -d -m u::rwx,g::rwx,o::rx,u:1:rw open && echo x > open/f \
         && mkdir open/d && {SHOW} open/f open/d && getfacl -n open/f open/d && cat open/f"
    );
    for dir in [&fixture.plain, &fixture.mnt] {
        prepare(dir);
        std::os::unix::fs::chown(dir.join("open"), Some(UID), Some(GID)).unwrap();
    }
    let plain = as_other(&fixture.plain, &script);
    if plain.contains("failed: true") {
        println!("skipped: the temporary directory takes no ACLs");
        return;
    }
    assert_eq!(plain, as_other(&fixture.mnt, &script));
    assert!(plain.contains("user:1:rw-"), "{plain}");
    // A named user's entry is obeyed.
    let reader = |dir: &Path| {
        let output = Command::new("cat")
            .arg(dir.join("open/f"))
            .uid(1)
            .gid(1)
            .output();
        output.unwrap().stdout
    };
    assert_eq!(reader(&fixture.plain), reader(&fixture.mnt));
    assert_eq!(reader(&fixture.mnt), b"x\n");
}

#[test]
fn a_running_program_is_not_overwritten() {
    let Some(fixture) = mounted() else { return };
    let program = fixture.mnt.join("sleeper");
    fs::copy("/bin/sleep", &program).unwrap();
    let mut child = Command::new(&program).arg("30").spawn().unwrap();
    let writing = fs::OpenOptions::new().write(true).open(&program);
    let cutting = rustix::fs::open(
        &program,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::TRUNC,
        rustix::fs::Mode::empty(),
    );
    let size = fs::metadata(&program).unwrap().len();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(writing.unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
    assert_eq!(cutting.unwrap_err(), rustix::io::Errno::TXTBSY);
    assert!(size > 0, "it was not cut off either");
}
