//! The page of `--html` in a browser: headless Chromium, where that is installed.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pinfold_scenarios::report::{Document, Extent, html};
use pinfold_scenarios::scenario::Failure;
use pinfold_scenarios::{Outcome, Record, suite};

/// What would run, or break out of its attribute, if it were not escaped.
const NASTY: &str = "</dd></pre><script>document.title = 'owned'</script><img src=x onerror='document.title=\"owned\"'>\"'&";

fn outcome(number: usize) -> Outcome {
    let failures = vec![Failure {
        check: NASTY.into(),
        saw: NASTY.into(),
    }];
    match number % 5 {
        0 => Outcome::Passed { checks: 3 },
        1 => Outcome::Diverges {
            failures,
            reasons: vec![NASTY.into()],
        },
        2 => Outcome::Failed { failures },
        3 => Outcome::Hung {
            why: NASTY.into(),
            stacks: format!("{NASTY}\n{}", "x".repeat(400)),
        },
        _ => Outcome::Skipped {
            reason: NASTY.into(),
        },
    }
}

/// Every scenario on two targets. Where the first fails the second hangs, and so on: both have every result.
fn document() -> Document {
    let targets = [("kernel", 0), (NASTY, 1)];
    let records = targets.iter().flat_map(|(target, shift)| {
        suite::all()
            .into_iter()
            .enumerate()
            .map(move |(number, scenario)| Record {
                target: (*target).into(),
                dir: "/mnt/a-directory-with-a-name-that-is-longer-than-most".into(),
                file_system: "ext4".into(),
                scenario: scenario.number.into(),
                name: scenario.name.into(),
                claim: scenario.claim.into(),
                seed: 7,
                seconds: 0.5,
                outcome: outcome(number + shift),
                notes: vec![NASTY.into()],
                varies: false,
            })
    });
    let extent = Extent {
        seed: 7,
        rounds: 3,
        runs: 300,
        interrupted: false,
    };
    Document::new(records.collect(), extent)
}

/// Put before everything else on the page: remembers its errors.
const EARS: &str = "<script>window.errors = [];
addEventListener('error', (event) => errors.push(String(event.message)), true);
addEventListener('securitypolicyviolation', (event) => errors.push('policy: ' + event.blockedURI));
</script>";

/// Put at its end: uses it and leaves what it saw in an element.
const PROBE: &str = "<script>
const visible = () => [...document.querySelectorAll('tbody tr')].filter((row) => row.getClientRects().length > 0);
const all = visible().length;
for (const box of document.querySelectorAll('.filter input')) if (box.value !== 'hung') box.click();
const seen = {
  all,
  hung: visible().length,
  strangers: visible().filter((row) => !row.dataset.results.includes('hung')).length,
  told: document.querySelector('.filter output').value,
  background: getComputedStyle(document.body).backgroundColor,
  text: getComputedStyle(document.body).color,
  wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  width: document.documentElement.clientWidth,
  cells: document.querySelectorAll('tbody td').length,
  foreign: document.querySelectorAll('img, link, iframe, [src], [href]').length,
  scripts: document.scripts.length,
  folded: [...document.querySelectorAll('.stacks')].every((stack) => !stack.open),
  title: document.title,
  errors,
};
const pre = document.createElement('pre');
pre.id = 'seen';
pre.textContent = btoa(JSON.stringify(seen));
document.body.append(pre);
</script>";

fn browser() -> Option<PathBuf> {
    let names = [
        "chromium",
        "chromium-browser",
        "google-chrome",
        "chrome-headless-shell",
    ];
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .flat_map(|dir| names.map(|name| dir.join(name)))
        .find(|program| program.is_file())
}

fn load(browser: &Path, dir: &Path, page: &Path, more: &[&str]) -> Output {
    Command::new("timeout")
        .args(["-k", "5", "50"])
        .arg(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--enable-logging=stderr",
            "--dump-dom",
        ])
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .args(more)
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap()
}

/// Loads the page with the probe in it; returns what that saw.
fn probed(browser: &Path, page: &str, more: &[&str]) -> serde_json::Value {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("page.html");
    let page = page
        .replacen("<head>", &format!("<head>{EARS}"), 1)
        .replacen("</body>", &format!("{PROBE}</body>"), 1);
    std::fs::write(&file, page).unwrap();
    let output = load(browser, dir.path(), &file, more);
    let console = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!console.contains("CONSOLE"), "{console}");
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let seen = dom
        .split_once("<pre id=\"seen\">")
        .and_then(|(_, rest)| rest.split_once("</pre>"))
        .unwrap_or_else(|| panic!("the probe did not run: {console}\n{dom}"));
    let file = dir.path().join("seen");
    std::fs::write(&file, seen.0).unwrap();
    let plain = Command::new("base64").arg("-d").arg(file).output().unwrap();
    serde_json::from_slice(&plain.stdout).unwrap()
}

/// Sum of the colour's parts in "rgb(r, g, b)".
fn brightness(colour: &serde_json::Value) -> u32 {
    let colour = colour.as_str().unwrap();
    let parts = colour.trim_start_matches("rgb(").trim_end_matches(')');
    parts
        .split(',')
        .map(|part| part.trim().parse::<u32>().unwrap())
        .sum()
}

#[test]
fn the_page_works_in_a_browser_in_light_and_dark_and_on_narrow_screens() {
    let Some(browser) = browser() else {
        return println!("skipped: no Chromium is installed");
    };
    let document = document();
    let page = html::page(&document);
    let rows = suite::all().len();
    // 0 is dark and 1 is light, as Blink counts.
    for (scheme, window) in [(0, "1280,900"), (1, "520,900")] {
        let more = [
            format!("--blink-settings=preferredColorScheme={scheme}"),
            format!("--window-size={window}"),
        ];
        let seen = probed(&browser, &page, &[&more[0], &more[1]]);
        println!("{seen}");
        assert_eq!(seen["errors"], serde_json::json!([]));
        assert_eq!(seen["all"], rows);
        assert_eq!(seen["cells"], 2 * rows);
        // Two of five results side by side: those that hang on either target.
        let hung = seen["hung"].as_u64().unwrap() as usize;
        assert!(hung > rows / 4 && hung < rows / 2, "{hung} of {rows}");
        assert_eq!(seen["strangers"], 0);
        assert_eq!(seen["told"], format!("{hung} of {rows} scenarios"));
        assert_eq!(
            seen["wide"], false,
            "{} pixels are not enough",
            seen["width"]
        );
        assert_eq!(seen["folded"], true);
        // The page's own, and the two of this test.
        assert_eq!((&seen["scripts"], &seen["foreign"]), (&3.into(), &0.into()));
        assert_eq!(seen["title"], "pinfold torture: something bad was found");
        let (back, text) = (brightness(&seen["background"]), brightness(&seen["text"]));
        if scheme == 0 {
            assert!(back < 150 && text > 500, "dark: {back} behind {text}");
        } else {
            assert!(back > 600 && text < 200, "light: {back} behind {text}");
        }
    }
}

#[test]
fn the_page_has_every_result_and_nothing_of_it_runs() {
    let page = html::page(&document());
    assert_eq!(
        page.matches("<tr data-results=").count(),
        suite::all().len()
    );
    assert_eq!(page.matches("<script>").count(), 1, "the page's own");
    assert_eq!(page.matches("<img").count(), 0);
    for shown in [
        "Linux ",
        env!("CARGO_PKG_VERSION"),
        "7 to 9, one a round",
        "300 in 3 rounds",
    ] {
        assert!(page.contains(shown), "{shown}");
    }
}
