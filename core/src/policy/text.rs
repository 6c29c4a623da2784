//! The one-line form of a policy: reading and writing.

use super::{Choice, Fix, Heads, LayerTable, Life, Policy, PolicyError, Score, Store, ThinValues, Tokens};
use crate::{Lambda, token::snapkv::Pool};
use core::{
    fmt,
    str::{FromStr, Split},
};

const fn syntax<T>(at: usize, expected: &'static str) -> Result<T, PolicyError> {
    Err(PolicyError::Syntax { at, expected })
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(line: &str) -> Result<Self, PolicyError> {
        let mut policy = Self::FULL;
        let mut start = 0;
        // An item goes on to the next comma outside of parentheses.
        while start <= line.len() {
            let mut depth = 0usize;
            let ends = |&(_, c): &(usize, char)| {
                match c {
                    '(' => depth += 1,
                    ')' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                c == ',' && depth == 0
            };
            let end = line[start..].char_indices().find(ends).map_or(line.len(), |(at, _)| start + at);
            let raw = &line[start..end];
            let item = raw.trim();
            let at = start + (raw.len() - raw.trim_start().len());
            match item.split_once('=') {
                Some((slot, value)) => {
                    let value_at = at + slot.len() + 1 + (value.len() - value.trim_start().len());
                    policy.set(slot.trim(), at, Value::read(value.trim(), value_at)?)?;
                }
                None => match Self::preset(item) {
                    Some(preset) if start == 0 => policy = preset,
                    Some(_) => return syntax(at, "a preset only as the first item"),
                    None => {
                        return syntax(
                            at,
                            "slot=value, or full, think, think-official, quality, balanced, small or tiny to start with",
                        );
                    }
                },
            }
            start = end + 1;
        }
        policy.check()?;
        Ok(policy)
    }
}

/// The part alone, as it stands after `score=`.
impl FromStr for Score {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let mut value = Value::read(text.trim(), text.len() - text.trim_start().len())?;
        let score = value.score()?;
        value.end()?;
        score.check()?;
        Ok(score)
    }
}

/// A value that is being read: a word and its arguments.
struct Value<'a> {
    word: &'a str,
    at: usize,
    arguments: Option<Split<'a, char>>,
    argument_at: usize,
}

impl<'a> Value<'a> {
    fn read(text: &'a str, at: usize) -> Result<Self, PolicyError> {
        let Some((word, rest)) = text.split_once('(') else {
            return Ok(Self { word: text, at, arguments: None, argument_at: at + text.len() });
        };
        let argument_at = at + word.len() + 1;
        match rest.strip_suffix(')') {
            Some(inner) => Ok(Self { word: word.trim(), at, arguments: Some(inner.split(',')), argument_at }),
            None => syntax(at + text.len(), "a closing parenthesis"),
        }
    }

    /// The next argument and where it starts.
    fn next(&mut self, expected: &'static str) -> Result<(&'a str, usize), PolicyError> {
        let at = self.argument_at;
        match self.arguments.as_mut().and_then(Iterator::next) {
            Some(argument) => {
                self.argument_at += argument.len() + 1;
                Ok((argument.trim(), at))
            }
            None => syntax(at, expected),
        }
    }

    fn integer<T: FromStr>(&mut self, expected: &'static str) -> Result<T, PolicyError> {
        let (argument, at) = self.next(expected)?;
        // `FromStr` of integers also takes a sign.
        let digits = !argument.is_empty() && argument.bytes().all(|byte| byte.is_ascii_digit());
        match argument.parse() {
            Ok(number) if digits => Ok(number),
            _ => syntax(at, expected),
        }
    }

    /// A share from 0 to 1 with at most three decimals, in per mille.
    fn share(&mut self) -> Result<(u16, usize), PolicyError> {
        const EXPECTED: &str = "a share from 0 to 1 with at most three decimals";
        let (argument, at) = self.next(EXPECTED)?;
        match share(argument) {
            Some(per_mille) => Ok((per_mille, at)),
            None => syntax(at, EXPECTED),
        }
    }

    fn lambda(&mut self) -> Result<Lambda, PolicyError> {
        let (per_mille, at) = self.share()?;
        lambda(per_mille, at)
    }

    fn pool(&mut self) -> Result<Pool, PolicyError> {
        match self.next("avg or max")? {
            ("avg", _) => Ok(Pool::Avg),
            ("max", _) => Ok(Pool::Max),
            (_, at) => syntax(at, "avg or max"),
        }
    }

    fn end(mut self) -> Result<(), PolicyError> {
        let at = self.argument_at;
        match self.arguments.as_mut() {
            None => Ok(()),
            Some(rest) => match rest.next() {
                None => Ok(()),
                Some(_) => syntax(at, "no further argument"),
            },
        }
    }
}

fn lambda(per_mille: u16, at: usize) -> Result<Lambda, PolicyError> {
    Lambda::from_per_mille(per_mille).or(syntax(at, "a share below 1"))
}

/// `.5`, `0.5`, `0` or `1` in per mille.
fn share(text: &str) -> Option<u16> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if decimals.is_empty() || decimals.len() > 3 || !digits(decimals) {
        return None;
    }
    let thousandths = decimals.parse::<u16>().ok()? * [100, 10, 1][decimals.len() - 1];
    match whole {
        "" if text.starts_with('.') => Some(thousandths),
        "0" => Some(thousandths),
        "1" if thousandths == 0 => Some(1000),
        _ => None,
    }
}

impl Policy {
    fn set(&mut self, slot: &str, at: usize, mut value: Value<'_>) -> Result<(), PolicyError> {
        let v = &mut value;
        match slot {
            "tokens" => self.tokens = v.tokens()?,
            "score" => self.score = v.score()?,
            "choice" => self.choice = v.choice()?,
            "fix" => {
                self.fix = match v.word {
                    "none" => Fix::None,
                    "compensated" => Fix::Compensated,
                    "lowrank" => Fix::Lowrank,
                    "predictive" => Fix::Predictive,
                    _ => return syntax(v.at, "none, compensated, predictive or lowrank"),
                }
            }
            "thin-values" => {
                self.thin_values = match v.word {
                    "whole" => ThinValues::Whole,
                    "query" => ThinValues::Query { lambda: v.lambda()? },
                    "l2" => ThinValues::L2 { lambda: v.lambda()? },
                    _ => return syntax(v.at, "whole, query(λ) or l2(λ)"),
                }
            }
            "keys" => self.keys = v.store()?,
            "values" => self.values = v.store()?,
            "heads" => {
                self.heads = match v.word {
                    "kv" => Heads::Kv,
                    "query" => Heads::Query,
                    _ => return syntax(v.at, "kv or query"),
                }
            }
            "life" => {
                self.life = match v.word {
                    "prompt" => Life::Prompt,
                    "turn" => Life::Turn,
                    "every" => Life::Every { tokens: v.integer("a number of tokens")? },
                    _ => return syntax(v.at, "prompt, turn or every(tokens)"),
                }
            }
            "lambda" => {
                let Some(per_mille) = share(v.word) else {
                    return syntax(v.at, "a share from 0 to 1 with at most three decimals");
                };
                let new = lambda(per_mille, v.at)?;
                match &mut self.choice {
                    Choice::Top { lambda } | Choice::Adaptive { lambda, .. } | Choice::Calibrated { lambda, .. } => {
                        *lambda = new;
                    }
                    _ => return syntax(at, "lambda only after a choice that has one: top, adaptive or calibrated"),
                }
            }
            _ => {
                return syntax(
                    at,
                    "a slot: tokens, score, choice, fix, thin-values, keys, values, heads, life or lambda",
                );
            }
        }
        // Words that take arguments have read them; parentheses after other words hold one too many.
        value.end()
    }
}

impl Value<'_> {
    fn tokens(&mut self) -> Result<Tokens, PolicyError> {
        const N: &str = "a number of tokens";
        Ok(match self.word {
            "all" => Tokens::All,
            "window" => Tokens::Window { sinks: self.integer(N)?, window: self.integer(N)? },
            "snapkv" => Tokens::Snapkv {
                capacity: self.integer(N)?,
                window: self.integer(N)?,
                kernel: self.integer(N)?,
                pool: self.pool()?,
            },
            "h2o" => Tokens::H2o { capacity: self.integer(N)?, recent: self.integer(N)? },
            _ => {
                return syntax(
                    self.at,
                    "all, window(sinks,window), snapkv(capacity,window,kernel,pool) or h2o(capacity,recent)",
                );
            }
        })
    }

    fn score(&mut self) -> Result<Score, PolicyError> {
        Ok(match self.word {
            "query" => Score::Query,
            "sample" => Score::Sample { tokens: self.integer("a number of tokens")? },
            "residual" => Score::Residual,
            "sketch" => Score::Sketch { rows: self.integer("a number of rows")? },
            "l1" => Score::L1,
            "l2" => Score::L2,
            "random" => Score::Random { seed: self.integer("a seed")? },
            _ => return syntax(self.at, "query, residual, sample(tokens), sketch(rows), l1, l2 or random(seed)"),
        })
    }

    fn choice(&mut self) -> Result<Choice, PolicyError> {
        const N: &str = "a number of channels";
        Ok(match self.word {
            "whole" => Choice::Whole,
            "top" => Choice::Top { lambda: self.lambda()? },
            "threshold" => Choice::Threshold { energy: self.share()?.0 },
            "adaptive" => Choice::Adaptive { lambda: self.lambda()?, minimum: self.integer(N)? },
            "calibrated" => Choice::Calibrated { lambda: self.lambda()?, multiple: self.integer(N)? },
            "dynamic" => Choice::Dynamic { least: self.lambda()?, most: self.lambda()? },
            "layers" => Choice::Layers { table: self.layers()? },
            _ => {
                return syntax(
                    self.at,
                    "whole, top(λ), layers(λ,count*λ,…), threshold(energy), adaptive(λ,minimum), calibrated(λ,multiple) or \
                     dynamic(least,most)",
                );
            }
        })
    }

    /// Runs of layers, up to the closing parenthesis: λ of one layer, or how many have it and λ, as `4*.5`.
    fn layers(&mut self) -> Result<LayerTable, PolicyError> {
        const EXPECTED: &str = "λ of a layer, or count*λ of 1 to 255 layers, as 4*.5";
        let mut table = LayerTable::default();
        let mut next = Ok(self.next(EXPECTED)?);
        while let Ok((argument, at)) = next {
            let (layers, text) = argument.split_once('*').map_or(("1", argument), |(n, text)| (n.trim(), text.trim()));
            let digits = layers.bytes().all(|byte| byte.is_ascii_digit());
            let (Some(per_mille), Ok(layers @ 1..), true) = (share(text), layers.parse::<u8>(), digits) else {
                return syntax(at, EXPECTED);
            };
            let full = "no further run of layers, of which there are at most 32; give neighbours the same λ";
            table.push(layers, lambda(per_mille, at)?).or(syntax(at, full))?;
            next = self.next(EXPECTED);
        }
        Ok(table)
    }

    fn store(&mut self) -> Result<Store, PolicyError> {
        match Store::ALL.into_iter().find(|store| store.name() == self.word) {
            Some(store) => Ok(store),
            None => syntax(
                self.at,
                "f32, f16, bf16, int8, int4, int3 or int2; of keys also int4/2, of values turned4, turned3, turned2 or trellis2",
            ),
        }
    }
}

/// A share in per mille, written as shortly as it can be.
struct Share(u16);

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0"),
            1000 => f.write_str("1"),
            x if x % 100 == 0 => write!(f, ".{}", x / 100),
            x if x % 10 == 0 => write!(f, ".{:02}", x / 10),
            x => write!(f, ".{x:03}"),
        }
    }
}

impl From<Lambda> for Share {
    fn from(lambda: Lambda) -> Self {
        Self(lambda.per_mille())
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::All => f.write_str("all"),
            Self::Window { sinks, window } => write!(f, "window({sinks},{window})"),
            Self::Snapkv { capacity, window, kernel, pool } => {
                let pool = if pool == Pool::Avg { "avg" } else { "max" };
                write!(f, "snapkv({capacity},{window},{kernel},{pool})")
            }
            Self::H2o { capacity, recent } => write!(f, "h2o({capacity},{recent})"),
        }
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Query => f.write_str("query"),
            Self::Sample { tokens } => write!(f, "sample({tokens})"),
            Self::Residual => f.write_str("residual"),
            Self::Sketch { rows } => write!(f, "sketch({rows})"),
            Self::L1 => f.write_str("l1"),
            Self::L2 => f.write_str("l2"),
            Self::Random { seed } => write!(f, "random({seed})"),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Whole => f.write_str("whole"),
            Self::Top { lambda } => write!(f, "top({})", Share::from(lambda)),
            Self::Threshold { energy } => write!(f, "threshold({})", Share(energy)),
            Self::Adaptive { lambda, minimum } => write!(f, "adaptive({},{minimum})", Share::from(lambda)),
            Self::Calibrated { lambda, multiple } => write!(f, "calibrated({},{multiple})", Share::from(lambda)),
            Self::Dynamic { least, most } => write!(f, "dynamic({},{})", Share::from(least), Share::from(most)),
            Self::Layers { table } => {
                f.write_str("layers")?;
                for (at, &(layers, lambda)) in table.runs().iter().enumerate() {
                    f.write_str(if at == 0 { "(" } else { "," })?;
                    if layers > 1 {
                        write!(f, "{layers}*")?;
                    }
                    write!(f, "{}", Share::from(lambda))?;
                }
                f.write_str(if table.runs().is_empty() { "()" } else { ")" })
            }
        }
    }
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Compensated => "compensated",
            Self::Lowrank => "lowrank",
            Self::Predictive => "predictive",
        })
    }
}

impl fmt::Display for ThinValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Whole => f.write_str("whole"),
            Self::Query { lambda } => write!(f, "query({})", Share::from(lambda)),
            Self::L2 { lambda } => write!(f, "l2({})", Share::from(lambda)),
        }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Heads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Kv { "kv" } else { "query" })
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Prompt => f.write_str("prompt"),
            Self::Turn => f.write_str("turn"),
            Self::Every { tokens } => write!(f, "every({tokens})"),
        }
    }
}

/// The name of the preset it equals, or the slots in which it differs from `full`.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = Self::PRESETS.iter().find(|(_, preset)| preset == self) {
            return f.write_str(name);
        }
        let full = Self::FULL;
        let mut comma = "";
        let mut item = |differs: bool, slot: &str, value: &dyn fmt::Display| {
            if differs {
                write!(f, "{comma}{slot}={value}")?;
                comma = ",";
            }
            Ok(())
        };
        item(self.tokens != full.tokens, "tokens", &self.tokens)?;
        item(self.score != full.score, "score", &self.score)?;
        item(self.choice != full.choice, "choice", &self.choice)?;
        item(self.fix != full.fix, "fix", &self.fix)?;
        item(self.thin_values != full.thin_values, "thin-values", &self.thin_values)?;
        item(self.keys != full.keys, "keys", &self.keys)?;
        item(self.values != full.values, "values", &self.values)?;
        item(self.heads != full.heads, "heads", &self.heads)?;
        item(self.life != full.life, "life", &self.life)
    }
}
