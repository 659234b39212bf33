//! Tests of the balloon: what a driver may count on, and what a hostile one gets.

mod model;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use super::*;
use crate::{
    devices::{
        bus::BusDevice,
        virtio::testing::{DATA, Driver, EVENT_IDX, INDIRECT, RAM_BYTES},
    },
    pagemap,
};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const HINTS: usize = 3;
const REPORTS: usize = 4;

const PAGE: u64 = 4096;
const ALL: u64 = 1 << F_STATS_VQ | 1 << F_FREE_PAGE_HINT | 1 << F_REPORTING;
const CONFIG_INTERRUPT: u32 = 2;

fn balloon() -> (Balloon, BalloonHandle) {
    let balloon = Balloon::new(RAM_BYTES as u64 / PAGE).unwrap();
    let handle = balloon.handle();
    (balloon, handle)
}

fn started() -> (Driver, BalloonHandle) {
    let (balloon, handle) = balloon();
    let mut driver = Driver::new(Box::new(balloon));
    driver.start(ALL | EVENT_IDX | INDIRECT);
    (driver, handle)
}

fn command(driver: &Driver) -> u32 {
    let mut word = [0; 4];
    driver.device.read(0x100 + HINT_COMMAND_OFFSET as u64, &mut word);
    u32::from_le_bytes(word)
}

fn chunks(address: u64, bytes: u64) -> std::ops::Range<u64> {
    address / PAGE..(address + bytes) / PAGE
}

/// Pages of `DATA..` with something in them.
fn fill(driver: &Driver, pages: u64) {
    for page in 0..pages {
        driver.put(DATA + page * PAGE, &[0xa5; PAGE as usize]);
    }
}

fn is_intact(driver: &Driver, pages: std::ops::Range<u64>) -> bool {
    pages.into_iter().all(|page| driver.get(DATA + page * PAGE, 4096) == [0xa5; 4096])
}

fn forget_marks(driver: &Driver) {
    driver.ram.iter().for_each(|region| region.get_mmap().bitmap().reset());
}

fn is_marked(driver: &Driver, page: u64) -> bool {
    let address = DATA + page * PAGE;
    let region = driver.ram.find_region(vm_memory::GuestAddress(address)).unwrap();
    region.bitmap().dirty_at((address - region.start_addr().0) as usize)
}

fn exists(driver: &Driver, page: u64) -> bool {
    let chunk = DATA / PAGE + page;
    let changed = pagemap::changed(driver.ram.iter().next().unwrap()).unwrap();
    changed[(chunk / 64) as usize] >> (chunk % 64) & 1 == 1
}

#[test]
fn reported_pages_are_gone_and_marked_when_the_driver_gets_them_back() {
    let (mut driver, handle) = started();
    fill(&driver, 16);
    forget_marks(&driver);
    let head = driver.offer(REPORTS, &[], &[(DATA + PAGE, 4096), (DATA + 4 * PAGE, 4 * 4096)]);
    driver.kick(REPORTS);
    assert_eq!(driver.wait_used(REPORTS), (head, 0));
    for page in 0..16 {
        let reported = page == 1 || (4..8).contains(&page);
        assert_eq!(exists(&driver, page), !reported, "{page}");
        assert_eq!(is_marked(&driver, page), reported, "{page}");
    }
    assert_eq!(driver.get(DATA + PAGE, 4096), [0; 4096]);
    assert!(is_intact(&driver, 0..1) && is_intact(&driver, 2..4) && is_intact(&driver, 8..16));
    assert_eq!((handle.reported_bytes(), handle.discarded_bytes()), (5 * PAGE, 5 * PAGE));
    // What is gone is not marked again: reports of larger blocks name it again and again.
    forget_marks(&driver);
    driver.offer(REPORTS, &[], &[(DATA + 4 * PAGE, 8 * 4096)]);
    driver.kick(REPORTS);
    driver.wait_used(REPORTS);
    let marked: Vec<u64> = (0..16).filter(|page| is_marked(&driver, *page)).collect();
    assert_eq!(marked, [8, 9, 10, 11]);
    assert_eq!((handle.reported_bytes(), handle.discarded_bytes()), (13 * PAGE, 9 * PAGE));
}

#[test]
fn only_whole_pages_that_the_device_may_write_are_discarded() {
    let (mut driver, _) = started();
    fill(&driver, 8);
    driver.offer(REPORTS, &[(DATA, 4 * 4096)], &[]);
    driver.offer(REPORTS, &[], &[(DATA + 1, 4095), (DATA + PAGE, 4095), (DATA + 2 * PAGE, 0)]);
    driver.offer(REPORTS, &[], &[(DATA + 4 * PAGE + 1, 3 * 4096)]);
    driver.kick(REPORTS);
    (0..3).for_each(|_| assert_eq!(driver.wait_used(REPORTS).1, 0));
    assert!(is_intact(&driver, 0..5) && is_intact(&driver, 7..8));
    assert_eq!(driver.get(DATA + 5 * PAGE, 2 * 4096), [0; 2 * 4096]);
}

#[test]
fn a_report_that_cannot_be_breaks_the_device_and_nothing_else() {
    let all = RAM_BYTES as u32;
    let no_ram: &[(u64, u32)] = &[(RAM_BYTES as u64, 4096)];
    for bad in [no_ram, &[(u64::MAX - 4095, 4096)], &[(DATA, u32::MAX)], &[(0, all), (0, all)]] {
        for queue in [REPORTS, HINTS] {
            let (mut driver, _) = started();
            fill(&driver, 4);
            driver.offer(queue, &[], &[&[(DATA, 4096)], bad].concat());
            driver.kick(queue);
            driver.wait_for("the failure", |d| d.status() & 64 != 0);
            assert!(driver.poll_used(queue).is_none());
            assert!(is_intact(&driver, 0..4));
            // And it works again once it is reset.
            driver.reset();
            driver.start(ALL);
            driver.offer(REPORTS, &[], &[(DATA, 4096)]);
            driver.kick(REPORTS);
            driver.wait_used(REPORTS);
        }
    }
}

#[test]
fn overlapping_pages_and_all_of_ram_are_borne() {
    let (mut driver, handle) = started();
    fill(&driver, 4);
    let many = [(DATA, 2 * 4096), (DATA + PAGE, 2 * 4096), (DATA, 4 * 4096)];
    driver.offer(REPORTS, &[], &many);
    // Across the border of two regions.
    driver.put(RAM_BYTES as u64 / 2 - PAGE, &[1; 2 * 4096]);
    driver.offer(REPORTS, &[], &[(RAM_BYTES as u64 / 2 - PAGE, 2 * 4096)]);
    driver.kick(REPORTS);
    driver.wait_used(REPORTS);
    driver.wait_used(REPORTS);
    assert_eq!(driver.get(DATA, 4 * 4096), [0; 4 * 4096]);
    assert_eq!(driver.get(RAM_BYTES as u64 / 2 - PAGE, 2 * 4096), [0; 2 * 4096]);
    assert_eq!(handle.discarded_bytes(), 6 * PAGE);
    // The rings go too: the guest has lost its queue, the host nothing.
    driver.offer(REPORTS, &[], &[(0, RAM_BYTES as u32)]);
    driver.kick(REPORTS);
    driver.wait_for("all to be gone", |_| handle.discarded_bytes() > 6 * PAGE);
    driver.write32(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn the_balloon_itself_stays_empty() {
    let (mut driver, _) = started();
    fill(&driver, 4);
    let mut config = [0xff; CONFIG_BYTES];
    driver.device.read(0x100, &mut config);
    assert_eq!(config, [0; CONFIG_BYTES]);
    let frames: Vec<u8> = (0..4).flat_map(|n| ((DATA / PAGE) as u32 + n).to_le_bytes()).collect();
    driver.put(DATA + 0x8000, &frames);
    driver.offer(STATISTICS, &[(DATA + 0x9000, 100)], &[]);
    driver.kick(STATISTICS);
    for queue in [INFLATE, DEFLATE] {
        // An array of frames, one of nonsense, and one that is far too long.
        driver.offer(queue, &[(DATA + 0x8000, 16)], &[]);
        driver.offer(queue, &[(DATA + 0x8001, 3)], &[]);
        driver.offer(queue, &[(0, RAM_BYTES as u32)], &[]);
        driver.kick(queue);
        (0..3).for_each(|_| assert_eq!(driver.wait_used(queue).1, 0));
    }
    assert!(is_intact(&driver, 0..4));
    assert!(driver.poll_used(STATISTICS).is_none(), "nobody asked for statistics");
    assert_eq!(driver.status(), 15);
}

#[test]
fn reports_can_be_acknowledged_without_effect() {
    let (mut driver, handle) = started();
    fill(&driver, 1);
    handle.set_discard(false);
    driver.offer(REPORTS, &[], &[(DATA, 4096)]);
    driver.kick(REPORTS);
    driver.wait_used(REPORTS);
    assert!(is_intact(&driver, 0..1));
    assert_eq!((handle.reported_bytes(), handle.discarded_bytes()), (PAGE, 0));
}

#[test]
fn queues_are_found_whichever_way_the_driver_counts() {
    let (stats, hint, report) = (1 << F_STATS_VQ, 1 << F_FREE_PAGE_HINT, 1 << F_REPORTING);
    let find = |features, ready: &[usize]| {
        let roles = Roles::new(features, |at| ready.contains(&at));
        [Role::Statistics, Role::Hints, Role::Reports]
            .map(|role| (0..QUEUES).find(|queue| roles.of(*queue) == Some(role)))
    };
    let both = [Some(2), Some(3), Some(4)];
    assert_eq!(find(stats | hint | report, &[0, 1, 2, 3, 4]), both);
    // A driver that leaves a queue out, counted as the specification does and as Linux does.
    assert_eq!(find(report, &[0, 1, 4]), [None, None, Some(4)]);
    assert_eq!(find(report, &[0, 1, 2]), [None, None, Some(2)]);
    assert_eq!(find(hint | report, &[0, 1, 3, 4]), [None, Some(3), Some(4)]);
    assert_eq!(find(hint | report, &[0, 1, 2, 3]), [None, Some(2), Some(3)]);
    assert_eq!(find(stats | report, &[0, 1, 2, 4]), [Some(2), None, Some(4)]);
    assert_eq!(find(stats | report, &[0, 1, 2, 3]), [Some(2), None, Some(3)]);
    assert_eq!(find(0, &[0, 1]), [None; 3]);
}

#[test]
fn hints_count_under_the_command_in_force_only() {
    let (mut driver, handle) = started();
    fill(&driver, 32);
    let hints = handle.hints();
    assert!(hints.offered() && !hints.worthwhile(), "the driver reports");
    assert!(hints.start());
    assert_eq!(driver.wait_interrupt(), CONFIG_INTERRUPT);
    assert_eq!(command(&driver), 2);
    let say = |driver: &mut Driver, command: u32| {
        driver.put(DATA + 0x10_0000, &command.to_le_bytes());
        driver.offer(HINTS, &[(DATA + 0x10_0000, 4)], &[]);
        driver.kick(HINTS);
        driver.wait_used(HINTS);
    };
    let name = |driver: &mut Driver, page: u64, pages: u64| {
        driver.offer(HINTS, &[], &[(DATA + page * PAGE, (pages * PAGE) as u32)]);
        driver.kick(HINTS);
        assert_eq!(driver.wait_used(HINTS).1, 0);
    };
    name(&mut driver, 0, 1);
    say(&mut driver, 7);
    name(&mut driver, 1, 1);
    assert!(hints.take().is_empty(), "no command, or one that was not given");
    say(&mut driver, 2);
    name(&mut driver, 4, 2);
    name(&mut driver, 6, 1);
    assert_eq!(hints.take(), [chunks(DATA + 4 * PAGE, 3 * PAGE)]);
    name(&mut driver, 9, 1);
    assert!(!hints.is_complete());
    say(&mut driver, CMD_STOP);
    assert!(hints.is_complete());
    name(&mut driver, 12, 1);
    assert_eq!(hints.take(), [chunks(DATA + 9 * PAGE, PAGE)]);
    assert!(is_intact(&driver, 0..32), "a hint discards nothing");
    hints.stop();
    driver.wait_for("the end of the command", |d| command(d) == hints::CMD_DONE);
    say(&mut driver, 2);
    name(&mut driver, 5, 1);
    assert!(hints.take().is_empty(), "the command is over");
    // The next one has a number of its own, also for a driver that started over.
    driver.reset();
    assert!(!hints.offered() && !hints.start());
    driver.start(1 << F_FREE_PAGE_HINT);
    assert!(hints.worthwhile() && hints.start());
    driver.wait_for("the command", |d| command(d) == 3);
}

#[test]
fn a_command_ends_when_the_machine_moves() {
    let (mut driver, handle) = started();
    fill(&driver, 8);
    assert!(handle.hints().start());
    driver.wait_interrupt();
    driver.put(DATA + 0x10_0000, &2u32.to_le_bytes());
    driver.offer(HINTS, &[(DATA + 0x10_0000, 4)], &[]);
    driver.kick(HINTS);
    driver.wait_used(HINTS);
    // The driver is in the middle of naming pages, and reports some, when the machine stops.
    driver.device.pause().unwrap();
    let hinted = driver.offer(HINTS, &[], &[(DATA, 4096)]);
    let reported = driver.offer(REPORTS, &[], &[(DATA + 4 * PAGE, 4096)]);
    let (target, arrived) = balloon();
    let (mut moved, _) = driver.hand_off(Box::new(target));
    assert_eq!(moved.wait_used(HINTS).0, hinted);
    assert_eq!(moved.wait_used(REPORTS).0, reported);
    assert_eq!(command(&moved), hints::CMD_DONE);
    moved.wait_for("its interrupt", |d| d.wait_interrupt() & CONFIG_INTERRUPT != 0);
    assert!(arrived.hints().take().is_empty());
    assert!(is_intact(&moved, 0..4));
    assert_eq!(moved.get(DATA + 4 * PAGE, 4096), [0; 4096]);
    // Numbers go on.
    assert!(arrived.hints().start());
    moved.wait_for("the next command", |d| command(d) == 3);
}

#[test]
fn a_state_of_another_size_is_refused() {
    let (driver, _) = started();
    driver.device.pause().unwrap();
    let mut state = driver.device.save().unwrap();
    for bytes in [0, 3, 5, 4000] {
        state.backend = vec![0xff; bytes];
        assert!(driver.device.restore(&state).is_err());
    }
    state.backend = vec![0xff; 4];
    driver.device.restore(&state).unwrap();
}
