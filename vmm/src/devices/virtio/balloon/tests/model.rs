//! A guest that allocates, frees, reports and hints at random while it is handed off: whatever it
//! holds keeps its content, here and in the copy that a handoff makes.
//!
//! The guest keeps the driver's side of the protocol and uses all the freedom that it leaves: it
//! goes on while reports are with the device, and takes hinted pages back at any time. The copy is
//! made as a handoff makes it: from marks only, leaving out what is hinted and was not written
//! since the command.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 48;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// In use, with this content.
    Held(u64),
    /// Free: the content is anybody's.
    Free,
    /// Out of the allocator until this report comes back.
    Reported(u16),
    /// Named under a command; kept until the command is over or the guest needs it.
    Hinted,
}

#[derive(Clone, Debug)]
enum Op {
    /// Takes a page, or writes to one that is held.
    Write(u64),
    Free(u64),
    /// Reports free pages from here on, so many at most.
    Report(u64, u64),
    Hint(u64, u64),
    /// Takes back what the device is done with.
    Collect,
    /// Another round of the handoff.
    Round,
    /// Goes over to another device.
    Cutover,
    /// The handoff is given up and starts over.
    Abort,
}

fn op() -> impl Strategy<Value = Op> {
    let page = 0..PAGES;
    prop_oneof![
        6 => page.clone().prop_map(Op::Write),
        6 => page.clone().prop_map(Op::Free),
        4 => (page.clone(), 1..12u64).prop_map(|(at, count)| Op::Report(at, count)),
        3 => (page, 1..12u64).prop_map(|(at, count)| Op::Hint(at, count)),
        4 => Just(Op::Collect),
        2 => Just(Op::Round),
        1 => Just(Op::Cutover),
        1 => Just(Op::Abort),
    ]
}

struct Guest {
    driver: Option<Driver>,
    handle: BalloonHandle,
    pages: Vec<Page>,
    writes: u64,
    /// The command that the guest names pages under.
    naming: u32,
    /// Buffers of hints that have not come back.
    hints_out: usize,
    handoff: Handoff,
}

/// The copy that a handoff makes.
struct Handoff {
    copy: Vec<Vec<u8>>,
    /// To be sent still.
    pending: BTreeSet<u64>,
    hinted: BTreeSet<u64>,
    written: BTreeSet<u64>,
}

impl Guest {
    fn new() -> Self {
        let (driver, handle) = started();
        let handoff = Handoff::begin(&driver, &handle);
        let pages = vec![Page::Free; PAGES as usize];
        Self {
            driver: Some(driver),
            handle,
            pages,
            writes: 0,
            naming: CMD_STOP,
            hints_out: 0,
            handoff,
        }
    }

    fn driver(&mut self) -> &mut Driver {
        self.driver.as_mut().unwrap()
    }

    fn page(&mut self, at: u64) -> &mut Page {
        &mut self.pages[at as usize]
    }

    /// Free pages from `at` on, at most `count`, as runs.
    fn take_free(&mut self, at: u64, count: u64, to: impl Fn() -> Page) -> Vec<(u64, u32)> {
        let free: Vec<u64> = (at..PAGES)
            .filter(|p| self.pages[*p as usize] == Page::Free)
            .take(count as usize)
            .collect();
        let mut runs: Vec<(u64, u32)> = Vec::new();
        for page in free {
            *self.page(page) = to();
            let address = DATA + page * PAGE;
            match runs.last_mut() {
                Some((start, len)) if *start + u64::from(*len) == address => *len += PAGE as u32,
                _ => runs.push((address, PAGE as u32)),
            }
        }
        runs
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write(at) => {
                // All but what is out of the allocator; a hinted page is taken back.
                if !matches!(self.pages[at as usize], Page::Reported(_)) {
                    self.writes += 1;
                    let value = self.writes;
                    *self.page(at) = Page::Held(value);
                    // Marked as KVM's log marks what a vCPU writes.
                    self.driver().put(DATA + at * PAGE, &content(value));
                }
            }
            Op::Free(at) => {
                if matches!(self.pages[at as usize], Page::Held(_)) {
                    *self.page(at) = Page::Free;
                }
            }
            Op::Report(at, count) => self.report(at, count),
            Op::Hint(at, count) => self.hint(at, count),
            Op::Collect => self.collect(),
            Op::Round => {
                let driver = self.driver.as_ref().unwrap();
                self.handoff.round(driver, &self.handle);
            }
            Op::Cutover => self.cutover(),
            Op::Abort => {
                self.handle.hints().stop();
                self.handoff = Handoff::begin(self.driver.as_ref().unwrap(), &self.handle);
            }
        }
    }

    fn report(&mut self, at: u64, count: u64) {
        let runs = self.take_free(at, count, || Page::Reported(u16::MAX));
        if runs.is_empty() {
            return;
        }
        let head = self.driver().offer(REPORTS, &[], &runs);
        for page in &mut self.pages {
            if *page == Page::Reported(u16::MAX) {
                *page = Page::Reported(head);
            }
        }
        self.driver().kick(REPORTS);
    }

    fn hint(&mut self, at: u64, count: u64) {
        let told = command(self.driver());
        if told < 2 {
            return;
        }
        if self.naming != told {
            self.naming = told;
            self.driver().put(DATA + PAGES * PAGE, &told.to_le_bytes());
            self.driver().offer(HINTS, &[(DATA + PAGES * PAGE, 4)], &[]);
            self.hints_out += 1;
        }
        let runs = self.take_free(at, count, || Page::Hinted);
        self.hints_out += runs.len();
        for run in runs {
            self.driver().offer(HINTS, &[], &[run]);
        }
        self.driver().kick(HINTS);
        // The queue is not endless.
        while self.hints_out > 64 {
            self.driver().wait_used(HINTS);
            self.hints_out -= 1;
        }
    }

    /// Takes back reports that came back, and hinted pages when the command is over.
    fn collect(&mut self) {
        while let Some((head, _)) = self.driver().poll_used(REPORTS) {
            let back = |page: &&mut Page| **page == Page::Reported(head);
            self.pages.iter_mut().filter(back).for_each(|page| *page = Page::Free);
        }
        while self.driver().poll_used(HINTS).is_some() {
            self.hints_out -= 1;
        }
        if command(self.driver()) == hints::CMD_DONE {
            self.pages
                .iter_mut()
                .filter(|page| **page == Page::Hinted)
                .for_each(|page| *page = Page::Free);
        }
    }

    /// The last round, the paused machine's state, and a new device that goes on.
    fn cutover(&mut self) {
        let driver = self.driver.take().unwrap();
        driver.device.pause().unwrap();
        self.handoff.last_round(&driver, &self.handle);
        for page in 0..PAGES {
            let source = driver.get(DATA + page * PAGE, PAGE as usize);
            assert!(
                source == self.handoff.copy[page as usize],
                "page {page} differs at the target"
            );
        }
        let (target, handle) = balloon();
        let (driver, _) = driver.hand_off(Box::new(target));
        self.handle = handle;
        self.handoff = Handoff::begin(&driver, &self.handle);
        self.driver = Some(driver);
    }

    /// Whatever the guest holds is what it wrote.
    fn check(&self) {
        let driver = self.driver.as_ref().unwrap();
        for (at, page) in (0..).zip(&self.pages) {
            if let Page::Held(value) = page {
                let found = driver.get(DATA + at * PAGE, PAGE as usize);
                assert!(found == content(*value), "page {at} lost what was written to it");
            }
        }
    }
}

impl Handoff {
    /// The log is on from here on, then hints are asked for.
    fn begin(driver: &Driver, handle: &BalloonHandle) -> Self {
        forget_marks(driver);
        assert!(handle.hints().start());
        Self {
            copy: vec![vec![0; PAGE as usize]; PAGES as usize],
            pending: (0..PAGES).collect(),
            hinted: BTreeSet::new(),
            written: BTreeSet::new(),
        }
    }

    fn round(&mut self, driver: &Driver, handle: &BalloonHandle) {
        for page in 0..PAGES {
            if is_marked(driver, page) {
                let address = vm_memory::GuestAddress(DATA + page * PAGE);
                let region = driver.ram.find_region(address).unwrap();
                region.get_mmap().bitmap().reset_addr_range((DATA + page * PAGE) as usize, 1);
                self.written.insert(page);
                self.pending.insert(page);
            }
        }
        let first = DATA / PAGE;
        let named = handle.hints().take().into_iter().flatten();
        self.hinted.extend(named.map(|chunk| chunk - first));
        for page in std::mem::take(&mut self.pending) {
            if self.hinted.contains(&page) && !self.written.contains(&page) {
                self.pending.insert(page);
            } else {
                self.copy[page as usize] = driver.get(DATA + page * PAGE, PAGE as usize);
            }
        }
    }

    /// The machine is paused. What is hinted and was not written is discarded on both sides.
    fn last_round(&mut self, driver: &Driver, handle: &BalloonHandle) {
        self.round(driver, handle);
        for page in self.hinted.difference(&self.written) {
            memory::drop_chunk(&driver.ram, DATA / PAGE + page).unwrap();
            self.copy[*page as usize].fill(0);
        }
    }
}

fn content(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(PAGE as usize / 8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn what_a_guest_holds_keeps_its_content(ops in prop::collection::vec(op(), 1..120)) {
        let mut guest = Guest::new();
        for op in &ops {
            guest.apply(op);
            guest.check();
        }
        guest.cutover();
        guest.check();
    }
}
