//! The headers: that they are what the sources say, and that compilers take them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::built::{Against, compile, no_compiler};

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Makes the header from the sources, without what rustdoc alone has a use for.
fn generated() -> String {
    let config = cbindgen::Config::from_file(here().join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new()
        .with_crate(here())
        .with_config(config)
        .generate()
        .unwrap();
    let mut bytes = Vec::new();
    bindings.write(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let mut kept = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        // What C is to promise is said once, at the top of the header.
        if line.trim() == "//"
            && lines
                .peek()
                .is_some_and(|next| next.trim() == "// # Safety")
        {
            while lines.peek().is_some_and(|next| next.starts_with("//")) {
                lines.next();
            }
            continue;
        }
        kept.push(line);
    }
    kept.join("\n") + "\n"
}

#[test]
fn the_header_is_what_the_sources_say() {
    let path = here().join("include/pinfold.h");
    let made = generated();
    if std::env::var_os("PINFOLD_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    let differs = committed.lines().zip(made.lines()).find(|(a, b)| a != b);
    assert!(
        committed == made,
        "include/pinfold.h is not what src/ says, first at {differs:?}; \
         make it with PINFOLD_WRITE_HEADER=1 cargo test -p pinfold-capi the_header"
    );
}

#[test]
fn both_headers_compile_alone_without_a_warning() {
    if no_compiler() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.c");
    std::fs::write(&empty, "int main(void) { return 0; }\n").unwrap();
    let strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c"];
    for header in ["pinfold.h", "pinfold_posix.h"] {
        let path: PathBuf = here().join("include").join(header);
        let flags = [&strict[..], &["-include", path.to_str().unwrap()]].concat();
        let object = dir.path().join("empty.o");
        compile(&object, std::slice::from_ref(&empty), Against::Libc, &flags);
    }
    let cpp = Command::new("g++")
        .args(["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++"])
        .arg(here().join("include/pinfold.h"))
        .output();
    if let Ok(output) = cpp {
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
    }
}
