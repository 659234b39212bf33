# Shared by the recipes. Sourced under `set -euo pipefail`; sets $root, the repository.
#
# Everything here works without root and without mounting anything.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
common=$root/guest-images/recipes/common
kernel_dir=${HOWDAH_KERNEL_DIR:-$root/target/kernel}
cargo_target_dir=${CARGO_TARGET_DIR:-$root/target}
PATH=$PATH:/usr/sbin:/sbin

# Every file of an image carries this time, so that the same inputs give the same bytes.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1767225600}
export E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH
export LC_ALL=C TZ=UTC

# What a stock kernel needs as modules to see its disk, its network and its entropy source, over
# MMIO (howdah, QEMU microvm) or PCI (QEMU pc). One that a kernel has built in is skipped.
guest_modules=(virtio_mmio virtio_pci virtio_blk virtio_net virtio-rng virtio_balloon ext4)

# Free memory goes back to the host page by page (ADR 0011): every free page is reported, not only
# blocks of 2 MiB, and few are kept back in the CPUs' own lists, which are not looked at.
free_memory_words="page_reporting.page_reporting_order=0 sysctl.vm.percpu_pagelist_high_fraction=1000000"

say() { printf '%s\n' "$*" >&2; }

die() {
    printf 'recipe %s: %s\n' "$(basename "$(dirname "$0")")" "$*" >&2
    exit 1
}

need_commands() {
    local command missing=()
    for command in "$@"; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    [ ${#missing[@]} -eq 0 ] ||
        die "missing command(s): ${missing[*]}. Run scripts/setup, which installs them."
}

# Runs a command as root, or as something that files cannot tell from root.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else fakeroot -- "$@"; fi
}

# The guest kernel's release, after making sure that the kernel is there.
guest_release() {
    "$root/kernel/fetch" guest || die "no guest kernel: see above"
    sed -n 's/^ *"release": "\(.*\)".*/\1/p' "$kernel_dir/guest/kernel.json"
}

# build_static PACKAGE PROGRAM DEST: a program of ours as one static binary, so that it runs in any
# guest.
build_static() {
    local package=$1 program=$2 target=x86_64-unknown-linux-gnu built
    say "building $program"
    (cd "$root" && cargo rustc --quiet -p "$package" --bin "$program" --release --target "$target" \
        --target-dir "$cargo_target_dir" -- -C target-feature=+crt-static -C strip=symbols) ||
        die "$program does not build: see above"
    built=$cargo_target_dir/$target/release/$program
    if LC_ALL=C readelf -l "$built" | grep -q INTERP; then
        die "$built is not static: is libc6-dev installed?"
    fi
    install -m 755 "$built" "$3"
}

build_agent() { build_static howdah-agent howdah-agent "$1"; }

build_app() { build_static howdah-apps howdah-app "$1"; }

# busybox_into DIR APPLET...: busybox under DIR, and a link for each applet.
busybox_into() {
    local dir=$1 applet
    shift
    if LC_ALL=C readelf -l "$(command -v busybox)" | grep -q INTERP; then
        die "busybox is linked dynamically: install busybox-static (scripts/setup does)"
    fi
    mkdir -p "$dir"
    install -m 755 "$(command -v busybox)" "$dir/busybox"
    for applet in "$@"; do
        [ "$applet" = busybox ] || ln -sf busybox "$dir/$applet"
    done
}

# resolve_modules RELEASE NAME...: paths below modules/RELEASE in the order in which to load them.
resolve_modules() {
    local dir=$kernel_dir/guest/modules/$1
    shift
    [ -s "$dir/modules.dep" ] || die "no $dir/modules.dep: run kernel/fetch --refresh guest"
    printf '%s\n' "$@" | awk -v dep="$dir/modules.dep" -v builtin="$dir/modules.builtin" '
        function name_of(path) {
            sub(/.*\//, "", path); sub(/\.ko(\.(xz|zst|gz))?$/, "", path); gsub(/-/, "_", path)
            return path
        }
        BEGIN {
            while ((getline line < dep) > 0) {
                split(line, part, ":"); n = name_of(part[1]); path[n] = part[1]; needs[n] = part[2]
            }
            while ((getline line < builtin) > 0) built[name_of(line)] = 1
        }
        {
            n = name_of($0)
            if (n in built) next
            if (!(n in path)) { print "no kernel module " $0 > "/dev/stderr"; exit 1 }
            # modules.dep names what to load first last.
            for (i = split(needs[n], need, " "); i > 0; i--) if (!seen[need[i]]++) print need[i]
            if (!seen[path[n]]++) print path[n]
        }' || die "the guest kernel lacks a module that guests need: see above"
}

# unpack_module SOURCE DEST: copies a module, uncompressed whatever Debian ships.
unpack_module() {
    case $1 in
    *.xz) xz -dc "$1" >"$2" ;;
    *.zst) zstd -qdc "$1" >"$2" ;;
    *) cp "$1" "$2" ;;
    esac
}

# make_initramfs RELEASE OUT: loads the modules, mounts root=, hands over to its init.
make_initramfs() {
    local release=$1 out=$2 dir path name modules
    dir=$(mktemp -d "$work/initramfs.XXXXXX")
    busybox_into "$dir/bin" sh mount umount mkdir insmod sleep switch_root cat ls
    install -m 755 "$common/initramfs-init" "$dir/init"
    mkdir -p "$dir/modules" "$dir/proc" "$dir/sys" "$dir/dev" "$dir/root"
    modules=$(resolve_modules "$release" "${guest_modules[@]}")
    for path in $modules; do
        name=$(basename "$path")
        name=${name%%.ko*}.ko
        unpack_module "$kernel_dir/guest/modules/$release/$path" "$dir/modules/$name"
        echo "$name" >>"$dir/modules/order"
    done
    normalise "$dir"
    (cd "$dir" && find . | sort | cpio --quiet --reproducible -o -H newc -R 0:0) |
        zstd -q -19 >"$out"
}

# normalise DIR: permissions and times that do not depend on who built it, when and where.
normalise() {
    chmod -R u=rwX,go=rX "$1"
    find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

# make_ext4 DIR OUT MIB UUID: a file system with DIR's content, owned by root.
make_ext4() {
    local dir=$1 out=$2 mib=$3 uuid=$4
    rm -f "$out"
    truncate -s "${mib}M" "$out"
    # 4 KiB blocks, so that a file's block is a chunk. Nothing is left for the guest to
    # initialise lazily: an idle guest should write nothing.
    as_root mkfs.ext4 -q -F -b 4096 -m 0 -J size=4 -L howdah -U "$uuid" \
        -E "hash_seed=$uuid,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0" \
        -d "$dir" "$out" || die "could not make a file system of $mib MiB from $dir: too small?"
}

# stamp_inodes DIR IMAGE: the change times, which mkfs.ext4 takes from the build's own files.
stamp_inodes() {
    local dir=$1 image=$2
    (cd "$dir" && find . | sed 's/^\.//; s/^$/\//') | while IFS= read -r path; do
        for field in atime ctime mtime crtime; do
            printf 'sif "%s" %s @%s\n' "$path" "$field" "$SOURCE_DATE_EPOCH"
            printf 'sif "%s" %s_extra 0\n' "$path" "$field"
        done
    done >"$work/stamp.debugfs"
    debugfs -w -f "$work/stamp.debugfs" "$image" >"$work/stamp.log" 2>&1 ||
        die "debugfs could not stamp $image: $(tail -n1 "$work/stamp.log")"
}

# write_cmdline WORD...: the guest's kernel command line. reboot=k panic=-1: a guest that panics
# resets at once, and its VMM notices.
write_cmdline() {
    echo "console=ttyS0 root=/dev/vda rw quiet reboot=k panic=-1" "$@" "$free_memory_words" \
        "howdah.ip=10.99.0.2/24 howdah.gw=10.99.0.1" >"$work/out/cmdline"
}

# publish OUTDIR: moves the parts from $work into place.
publish() {
    local part
    for part in kernel initramfs disk.raw cmdline; do
        mv "$work/out/$part" "$1/$part"
    done
    say "$(basename "$(dirname "$0")"): kernel, initramfs, disk.raw and cmdline in $1"
}

# begin OUTDIR: makes OUTDIR and, inside it, $work, which goes away at the end.
begin() {
    mkdir -p "$1" || die "cannot make output directory $1"
    work=$(mktemp -d "$1/.work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/out"
}
