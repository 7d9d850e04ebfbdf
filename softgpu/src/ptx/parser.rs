//! Tokens to syntax tree.

use super::PtxError;
use super::lexer::{Token, tokens};
use super::syntax::{Entry, Init, Loc, Module, Operand, Param, Space, Stmt, Var};
use std::collections::HashMap;

type Result<T> = std::result::Result<T, PtxError>;

/// Parses a whole PTX module.
///
/// # Errors
/// The first construct that is not understood, with its line.
pub fn parse(text: &str) -> Result<Module> {
    let mut parser = Parser { tokens: tokens(text)?, at: 0, module: Module::default() };
    parser.module()?;
    Ok(parser.module)
}

/// Bytes of a fundamental type.
pub(crate) fn type_bytes(name: &str) -> Option<u32> {
    Some(match name {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        "b128" => 16,
        _ => return None,
    })
}

struct Parser<'a> {
    tokens: Vec<(Token<'a>, u32)>,
    at: usize,
    module: Module,
}

/// Names of registers by nested `{ }` scope, innermost last.
#[derive(Default)]
struct Scopes(Vec<HashMap<String, u32>>);

impl Scopes {
    fn find(&self, name: &str) -> Option<u32> {
        self.0.iter().rev().find_map(|scope| scope.get(name).copied())
    }
}

impl<'a> Parser<'a> {
    fn line(&self) -> u32 {
        self.tokens.get(self.at.min(self.tokens.len().saturating_sub(1))).map_or(0, |t| t.1)
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(PtxError::new(self.line(), message))
    }

    fn peek(&self) -> Option<&Token<'a>> {
        self.tokens.get(self.at).map(|t| &t.0)
    }

    fn next(&mut self) -> Result<Token<'a>> {
        let token = self.tokens.get(self.at).map(|t| t.0.clone());
        self.at += 1;
        token.ok_or_else(|| PtxError::new(self.line(), "the text ends too early"))
    }

    fn word(&mut self) -> Result<&'a str> {
        match self.next()? {
            Token::Word(word) => Ok(word),
            other => self.fail(format!("expected a word, found {other:?}")),
        }
    }

    fn take(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(&Token::Mark(mark));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Result<()> {
        if self.take(mark) { Ok(()) } else { self.fail(format!("expected '{mark}', found {:?}", self.peek())) }
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(&Token::Word(word));
        self.at += usize::from(found);
        found
    }

    fn number<T: TryFrom<i128>>(&mut self) -> Result<T> {
        let negative = self.take('-');
        let word = self.word()?;
        let Some(value) = integer(word) else { return self.fail(format!("expected a number, found {word}")) };
        T::try_from(if negative { -value } else { value })
            .or_else(|_| self.fail(format!("number {value} is out of range")))
    }

    fn skip_statement(&mut self) -> Result<()> {
        while !self.take(';') {
            self.next()?;
        }
        Ok(())
    }

    fn skip_braces(&mut self) -> Result<()> {
        let mut depth = 0;
        loop {
            match self.next()? {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') if depth == 1 => return Ok(()),
                Token::Mark('}') => depth -= 1,
                _ => {}
            }
        }
    }

    fn module(&mut self) -> Result<()> {
        while self.at < self.tokens.len() {
            let mut is_extern = false;
            let mut word = self.word()?;
            while matches!(word, ".visible" | ".extern" | ".weak" | ".common") {
                is_extern |= word == ".extern";
                word = self.word()?;
            }
            match word {
                ".version" => self.module.version = self.word()?.to_owned(),
                ".target" => {
                    self.module.target = self.word()?.to_owned();
                    while self.take(',') {
                        self.word()?;
                    }
                }
                ".address_size" => self.address_size()?,
                ".file" => self.file()?,
                ".section" => {
                    self.word()?;
                    self.skip_braces()?;
                }
                ".pragma" => self.skip_statement()?,
                ".entry" => self.entry()?,
                ".func" => self.device_function()?,
                ".global" | ".const" | ".shared" => {
                    let var = self.var(word, is_extern)?;
                    self.module.vars.push(var);
                }
                other => return self.fail(format!("directive {other} is not supported at module level")),
            }
        }
        Ok(())
    }

    fn address_size(&mut self) -> Result<()> {
        match self.number::<u32>()? {
            64 => Ok(()),
            size => self.fail(format!("address size {size} is not supported, only 64")),
        }
    }

    fn file(&mut self) -> Result<()> {
        let number = self.number()?;
        let Token::Text(path) = self.next()? else { return self.fail("expected a file name") };
        self.module.files.insert(number, path.to_owned());
        while self.take(',') {
            self.number::<i128>()?;
        }
        Ok(())
    }

    /// Declarations are skipped; a definition is skipped too, and a call to it is refused where it stands.
    fn device_function(&mut self) -> Result<()> {
        loop {
            match self.peek() {
                Some(Token::Mark(';')) => return self.expect(';'),
                Some(Token::Mark('{')) => return self.skip_braces(),
                _ => self.next()?,
            };
        }
    }

    /// A variable after its space word: attributes, type, name, array bounds, initialiser, semicolon.
    fn var(&mut self, space: &str, is_extern: bool) -> Result<Var> {
        let space = match space {
            ".global" => Space::Global,
            ".const" => Space::Const,
            ".shared" => Space::Shared,
            ".local" => Space::Local,
            _ => Space::Param,
        };
        let (mut align, mut element, mut lanes) = (0, 0, 1);
        let name = loop {
            match self.word()? {
                ".align" => align = self.number()?,
                ".v2" => lanes = 2,
                ".v4" => lanes = 4,
                ".attribute" => self.skip_attribute()?,
                word if word.starts_with('.') => match type_bytes(&word[1..]) {
                    Some(bytes) => element = bytes,
                    None => return self.fail(format!("type {word} is not supported")),
                },
                name => break name.to_owned(),
            }
        };
        let mut count = Some(1u64);
        while self.take('[') {
            if self.take(']') {
                count = None;
            } else {
                let bound: u64 = self.number()?;
                count = count.map(|c| c * bound);
                self.expect(']')?;
            }
        }
        let init = if self.take('=') { self.initialiser(element)? } else { Vec::new() };
        let bytes = count.unwrap_or(if is_extern { 0 } else { init.len() as u64 }) * u64::from(element * lanes);
        if !self.take(';') {
            self.expect(',')?;
            return self.fail("several variables in one declaration are not supported");
        }
        Ok(Var { space, name, align: align.max(element * lanes), bytes, init, is_extern })
    }

    fn skip_attribute(&mut self) -> Result<()> {
        while !self.take(')') {
            self.next()?;
        }
        Ok(())
    }

    fn initialiser(&mut self, element: u32) -> Result<Vec<Init>> {
        if !self.take('{') {
            return Ok(vec![self.initial_value(element)?]);
        }
        let mut values = Vec::new();
        while !self.take('}') {
            if self.peek() == Some(&Token::Mark('{')) {
                values.extend(self.initialiser(element)?);
            } else {
                values.push(self.initial_value(element)?);
            }
            self.take(',');
        }
        Ok(values)
    }

    fn initial_value(&mut self, element: u32) -> Result<Init> {
        let negative = self.take('-');
        let word = self.word()?;
        let bits = match immediate(word) {
            Some(Operand::Int(value)) => (if negative { -value } else { value }) as u64,
            Some(Operand::F32(bits)) => u64::from(bits),
            Some(Operand::F64(bits)) => bits,
            _ => return self.initial_address(word),
        };
        Ok(Init::Bytes(bits.to_le_bytes()[..element as usize].to_vec()))
    }

    fn initial_address(&mut self, word: &str) -> Result<Init> {
        let is_generic = word == "generic";
        let name = if is_generic {
            self.expect('(')?;
            let name = self.word()?;
            self.expect(')')?;
            name
        } else {
            word
        };
        let offset = if self.take('+') { self.number()? } else { 0 };
        Ok(Init::Address(name.to_owned(), offset, is_generic))
    }

    fn entry(&mut self) -> Result<()> {
        let mut entry = Entry { name: self.word()?.to_owned(), ..Entry::default() };
        if self.take('(') {
            self.params(&mut entry)?;
        }
        loop {
            match self.next()? {
                Token::Mark('{') => break,
                Token::Mark(';') => return Ok(()),
                Token::Word(".maxntid") => entry.max_threads = Some(self.dimensions()?.iter().product()),
                Token::Word(".reqntid") => entry.required_threads = Some(self.dimensions()?),
                Token::Word(".reqnctapercluster") => entry.cluster = Some(self.dimensions()?),
                Token::Word(".explicitcluster") => {}
                Token::Word(".minnctapersm" | ".maxnctapersm" | ".maxnreg") => drop(self.number::<u32>()?),
                Token::Word(".pragma") => self.skip_statement()?,
                other => return self.fail(format!("{other:?} is not supported before a kernel body")),
            }
        }
        let mut scopes = Scopes(vec![HashMap::new()]);
        let mut loc = Loc::default();
        while !scopes.0.is_empty() {
            self.statement(&mut entry, &mut scopes, &mut loc)?;
        }
        self.module.entries.push(entry);
        Ok(())
    }

    fn dimensions(&mut self) -> Result<[u32; 3]> {
        let mut dims = [1; 3];
        for (i, dim) in dims.iter_mut().enumerate() {
            if i == 0 || self.take(',') {
                *dim = self.number()?;
            }
        }
        Ok(dims)
    }

    fn params(&mut self, entry: &mut Entry) -> Result<()> {
        let mut end = 0u32;
        while !self.take(')') {
            if !self.take_word(".param") {
                return self.fail("expected .param");
            }
            let (mut align, mut element) = (0, 0);
            let name = loop {
                match self.word()? {
                    ".align" => align = self.number()?,
                    ".ptr" | ".global" | ".const" | ".shared" | ".local" => {}
                    word if word.starts_with('.') => element = type_bytes(&word[1..]).unwrap_or(0),
                    name => break name.to_owned(),
                }
            };
            if element == 0 {
                return self.fail(format!("parameter {name} has a type that is not supported"));
            }
            let mut bytes = element;
            if self.take('[') {
                bytes *= self.number::<u32>()?;
                self.expect(']')?;
            }
            let offset = end.next_multiple_of(align.max(element));
            end = offset + bytes;
            entry.params.push(Param { name, bytes, offset });
            self.take(',');
        }
        Ok(())
    }

    fn statement(&mut self, entry: &mut Entry, scopes: &mut Scopes, loc: &mut Loc) -> Result<()> {
        let line = self.line();
        match self.next()? {
            Token::Mark('{') => scopes.0.push(HashMap::new()),
            Token::Mark('}') => drop(scopes.0.pop()),
            Token::Mark(';') => {}
            Token::Mark('@') => {
                let negated = self.take('!');
                let name = self.word()?;
                let Some(reg) = scopes.find(name) else { return self.fail(format!("unknown predicate {name}")) };
                let opcode = self.word()?;
                self.instruction(entry, scopes, *loc, line, Some((reg, negated)), opcode)?;
            }
            Token::Word(".loc") => *loc = self.loc()?,
            Token::Word(".reg") => self.registers(entry, scopes)?,
            Token::Word(word @ (".shared" | ".local" | ".param")) => {
                let var = self.var(word, false)?;
                entry.vars.push(var);
            }
            Token::Word(".pragma") => self.skip_statement()?,
            Token::Word(word) if self.take(':') => self.label(entry, word)?,
            Token::Word(opcode) => self.instruction(entry, scopes, *loc, line, None, opcode)?,
            other => return self.fail(format!("{other:?} is not supported in a kernel body")),
        }
        Ok(())
    }

    fn label(&mut self, entry: &mut Entry, name: &str) -> Result<()> {
        if !self.take_word(".branchtargets") {
            entry.labels.insert(name.to_owned(), entry.body.len());
            return Ok(());
        }
        let mut targets = Vec::new();
        while !self.take(';') {
            targets.push(self.word()?.to_owned());
            self.take(',');
        }
        entry.branch_targets.insert(name.to_owned(), targets);
        Ok(())
    }

    fn loc(&mut self) -> Result<Loc> {
        let (file, line) = (self.number()?, self.number()?);
        self.number::<u32>()?;
        let mut inlined_at = None;
        while self.take(',') {
            match self.word()? {
                "inlined_at" => {
                    inlined_at = Some((self.number()?, self.number()?));
                    self.number::<u32>()?;
                }
                _ => {
                    self.word()?;
                    if self.take('+') {
                        self.number::<u32>()?;
                    }
                }
            }
        }
        Ok(Loc { file, line, inlined_at })
    }

    fn registers(&mut self, entry: &mut Entry, scopes: &mut Scopes) -> Result<()> {
        let kind = self.word()?.trim_start_matches('.').to_owned();
        if kind != "pred" && type_bytes(&kind).is_none() {
            return self.fail(format!("register type .{kind} is not supported"));
        }
        let mut declare = |name: String| {
            if let Some(scope) = scopes.0.last_mut() {
                scope.insert(name, entry.regs.len() as u32);
            }
            entry.regs.push(kind.clone());
        };
        loop {
            let name = self.word()?;
            if self.take('<') {
                (0..self.number::<u32>()?).for_each(|i| declare(format!("{name}{i}")));
                self.expect('>')?;
            } else {
                declare(name.to_owned());
            }
            if self.take(';') {
                return Ok(());
            }
            self.expect(',')?;
        }
    }

    fn instruction(
        &mut self,
        entry: &mut Entry,
        scopes: &Scopes,
        loc: Loc,
        line: u32,
        guard: Option<(u32, bool)>,
        opcode: &str,
    ) -> Result<()> {
        let mut operands = Vec::new();
        while !self.take(';') {
            operands.push(self.operand(scopes)?);
            if !self.take(',') {
                self.expect(';')?;
                break;
            }
        }
        entry.body.push(Stmt { line, loc, guard, opcode: opcode.to_owned(), operands });
        Ok(())
    }

    fn operand(&mut self, scopes: &Scopes) -> Result<Operand> {
        let first = self.simple_operand(scopes)?;
        if self.take('|') {
            return Ok(Operand::Pair(Box::new(first), Box::new(self.simple_operand(scopes)?)));
        }
        Ok(first)
    }

    fn simple_operand(&mut self, scopes: &Scopes) -> Result<Operand> {
        match self.next()? {
            Token::Mark(open @ ('{' | '(')) => {
                let close = if open == '{' { '}' } else { ')' };
                let mut items = Vec::new();
                while !self.take(close) {
                    items.push(self.simple_operand(scopes)?);
                    self.take(',');
                }
                Ok(Operand::Tuple(items))
            }
            Token::Mark('[') => self.address(scopes),
            Token::Mark('!') => {
                let name = self.word()?;
                scopes.find(name).map(Operand::Not).ok_or_else(|| PtxError::new(self.line(), format!("unknown {name}")))
            }
            Token::Mark('-') => Ok(Operand::Int(-self.number::<i128>()?)),
            Token::Word("_") => Ok(Operand::Sink),
            Token::Word(word) => self.named(scopes, word),
            other => self.fail(format!("{other:?} is not an operand")),
        }
    }

    fn named(&mut self, scopes: &Scopes, word: &str) -> Result<Operand> {
        if let Some(reg) = scopes.find(word) {
            return Ok(Operand::Reg(reg));
        }
        if let Some(value) = immediate(word) {
            return Ok(value);
        }
        if word.starts_with('%') {
            return Ok(Operand::Special(word.to_owned()));
        }
        let offset = if self.take('+') { self.number()? } else { 0 };
        Ok(Operand::Symbol(word.to_owned(), offset))
    }

    fn address(&mut self, scopes: &Scopes) -> Result<Operand> {
        let base = self.simple_operand(scopes)?;
        let mut offset = 0;
        if self.take('+') || self.peek() == Some(&Token::Mark('-')) {
            offset = self.number()?;
        }
        self.expect(']')?;
        Ok(Operand::Address(Box::new(base), offset))
    }
}

/// An immediate operand, or `None` for a name.
fn immediate(word: &str) -> Option<Operand> {
    if !word.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    if let Some(hex) = word.strip_prefix("0f").or_else(|| word.strip_prefix("0F")) {
        return u32::from_str_radix(hex, 16).ok().map(Operand::F32);
    }
    if let Some(hex) = word.strip_prefix("0d").or_else(|| word.strip_prefix("0D")) {
        return u64::from_str_radix(hex, 16).ok().map(Operand::F64);
    }
    if word.contains('.') {
        return word.parse::<f64>().ok().map(|v| Operand::F64(v.to_bits()));
    }
    integer(word).map(Operand::Int)
}

fn integer(word: &str) -> Option<i128> {
    let word = word.strip_suffix('U').unwrap_or(word);
    if let Some(hex) = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        return i128::from_str_radix(hex, 16).ok();
    }
    if let Some(bits) = word.strip_prefix("0b") {
        return i128::from_str_radix(bits, 2).ok();
    }
    word.parse().ok()
}
