# Guests made of Debian's packages whose init is busybox, so that they are up in seconds under
# emulation too. Sourced after lib.sh.
#
#   HOWDAH_SUITE      Debian release (default bookworm)
#   HOWDAH_MIRROR     where packages come from (default http://deb.debian.org/debian)
#
# Packages are verified against Debian's archive keys. Needs a network, and no root.
# shellcheck shell=bash

need_packages_commands() {
    need_commands cargo busybox cpio zstd mkfs.ext4 readelf mmdebstrap tar
    [ "$(id -u)" = 0 ] || need_commands fakeroot newuidmap
}

# packages_overlay DIR ROOT: what is laid over Debian's own files: ours, and the recipe's ROOT.
# /bin and /sbin are links into /usr there.
packages_overlay() {
    local dir=$1 applet
    mkdir -p "$dir/usr/bin" "$dir/usr/sbin" "$dir/data"
    cp -R "$common/busybox-root/." "$2/." "$dir/"
    busybox_into "$dir/usr/lib/howdah/bin" ip killall
    for applet in init reboot poweroff halt; do
        ln -s ../lib/howdah/bin/busybox "$dir/usr/sbin/$applet"
    done
    install -m 755 "$common/agent-start" "$dir/usr/bin/howdah-agent-start"
    build_agent "$dir/usr/bin/howdah-agent"
}

# bootstrap PACKAGES OVERLAY TAR: Debian's packages with the overlay on top, as one tar.
bootstrap() {
    local mode=unshare
    [ "$(id -u)" != 0 ] || mode=root
    mmdebstrap --quiet --mode="$mode" --variant=minbase --include="$1" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --customize-hook="tar-in '$2' /" \
        "${HOWDAH_SUITE:-bookworm}" "$3" "${HOWDAH_MIRROR:-http://deb.debian.org/debian}" ||
        die "mmdebstrap failed: see above (no network, or no user namespaces for a user?)"
}

# packages_image OUTDIR PACKAGES OVERLAY UUID [MIB]: kernel, initramfs, disk.raw and cmdline. Without
# MIB the disk has what the files need, and 64 MiB.
packages_image() {
    local out=$1 packages=$2 overlay=$3 uuid=$4 mib=${5:-} release
    release=$(guest_release)
    normalise "$overlay"
    tar -C "$overlay" --owner=0 --group=0 --numeric-owner --sort=name -cf "$work/overlay.tar" .
    bootstrap "$packages" "$work/overlay.tar" "$work/root.tar"

    # Unpacked and packed again by one process tree: under fakeroot, owners live only as long as it.
    mkdir "$work/root"
    export -f make_ext4 as_root die
    # shellcheck disable=SC2016 # the inner shell expands it
    as_root bash -euc '
        tar -C "$1" --numeric-owner -xpf "$2"
        as_root() { "$@"; }
        # Block maps, directories and inodes are a few per cent of what the files take.
        files_mib=$(du -sm "$1" | cut -f1)
        make_ext4 "$1" "$3" "${4:-$((files_mib + files_mib / 20 + 64))}" "$5"
    ' bash "$work/root" "$work/root.tar" "$work/out/disk.raw" "$mib" "$uuid"

    make_initramfs "$release" "$work/out/initramfs"
    cp "$kernel_dir/guest/vmlinuz" "$work/out/kernel"
    write_cmdline
    publish "$out"
}
