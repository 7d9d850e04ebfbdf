//! Calls that fail because a test wants them to, so that it sees what a program does then.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, Once};

/// Calls of one entry point that fail.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    function: String,
    code: u32,
    /// Calls that go well before.
    skip: u64,
    /// Calls that fail then; none is left out by default.
    times: u64,
}

static RULES: Mutex<Vec<Rule>> = Mutex::new(Vec::new());
static IS_ARMED: AtomicBool = AtomicBool::new(false);
static FROM_ENV: Once = Once::new();

/// Results after which a device fails for good: it met a fault while it ran, or is gone.
fn is_lasting(code: u32) -> bool {
    matches!(code, 214 | 700 | 702 | 710 | 714..=719 | 999)
}

/// `FUNCTION=CODE`, with `@SKIP` behind it for calls that go well before and `xTIMES` for how many fail then.
fn parse(text: &str) -> Option<Rule> {
    let (function, rest) = text.trim().split_once('=')?;
    let (rest, times) = rest.split_once('x').map_or((rest, None), |(rest, times)| (rest, Some(times)));
    let (code, skip) = rest.split_once('@').map_or((rest, None), |(code, skip)| (code, Some(skip)));
    Some(Rule {
        function: function.to_owned(),
        code: code.parse().ok().filter(|code| *code != 0)?,
        skip: skip.map_or(Some(0), |skip| skip.parse().ok())?,
        times: times.map_or(Some(u64::MAX), |times| times.parse().ok())?,
    })
}

/// Has calls fail from now on as the rules say, which are separated by commas; none, and nothing fails.
///
/// # Errors
/// The rule that is none.
pub fn arm(text: &str) -> Result<(), String> {
    let texts = text.split(',').filter(|rule| !rule.trim().is_empty());
    let rules: Vec<Rule> = texts
        .map(|rule| parse(rule).ok_or_else(|| format!("{rule:?} is not FUNCTION=CODE[@SKIP][xTIMES]")))
        .collect::<Result<_, _>>()?;
    IS_ARMED.store(!rules.is_empty(), Relaxed);
    *RULES.lock().unwrap_or_else(|e| e.into_inner()) = rules;
    Ok(())
}

/// `SOFTGPU_FAIL` has rules that are there from the start.
fn arm_from_env() {
    let Ok(rules) = std::env::var("SOFTGPU_FAIL") else { return };
    if let Err(problem) = arm(&rules) {
        eprintln!("softgpu: SOFTGPU_FAIL: {problem}");
    }
}

/// What a call of this entry point is to fail with, and whether the device does for good.
pub fn failure(function: &str) -> Option<(u32, bool)> {
    FROM_ENV.call_once(arm_from_env);
    if !IS_ARMED.load(Relaxed) {
        return None;
    }
    let mut rules = RULES.lock().unwrap_or_else(|e| e.into_inner());
    let rule = rules.iter_mut().find(|rule| rule.function == function && rule.times > 0)?;
    if rule.skip > 0 {
        rule.skip -= 1;
        return None;
    }
    rule.times -= 1;
    Some((rule.code, is_lasting(rule.code)))
}
