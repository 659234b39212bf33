# Shared by kernel/fetch and kernel/build: where kernels are kept, and packages from apt
# without installing them. Sourced; the caller sets $root and runs under `set -euo pipefail`.
# shellcheck shell=bash disable=SC2154

kernel_dir=${HOWDAH_KERNEL_DIR:-$root/target/kernel}

say() { printf '%s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

need_commands() {
    local command missing=()
    for command in "$@"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing+=("$command")
    done
    [ ${#missing[@]} -eq 0 ] ||
        die "missing command(s): ${missing[*]}. Run scripts/setup, which installs them."
    PATH=$PATH:/usr/sbin:/sbin
}

sha256_of() { sha256sum <"$1" | cut -d' ' -f1; }

# The value of a string field in one of our own flat, one-field-a-line JSON files.
json_field() { sed -n "s/^ *\"$2\": \"\([^\"]*\)\".*/\1/p" "$1" | grep -m1 .; }

# Empty where this machine's package lists serve; see apt_lists.
apt_options=()

# apt_lists PACKAGE: makes sure that apt knows PACKAGE. Where the machine's own lists do not,
# private ones are filled from the same sources with the same keys, which needs no root.
apt_lists() {
    local package=$1 lists=$kernel_dir/.apt
    apt-cache "${apt_options[@]}" show --no-all-versions "$package" >/dev/null 2>&1 && return
    say "apt knows no $package yet: fetching package lists into $lists"
    mkdir -p "$lists/lists/partial" "$lists/cache/archives/partial"
    apt_options=(-o "Dir::State::Lists=$lists/lists" -o "Dir::Cache=$lists/cache"
        -o Debug::NoLocking=1 -o APT::Sandbox::User=)
    apt-get "${apt_options[@]}" -qq update >&2 ||
        die "apt-get update failed: no network, or no usable apt sources"
    apt-cache "${apt_options[@]}" show --no-all-versions "$package" >/dev/null 2>&1 ||
        die "no package $package in the apt sources of this machine: Debian 12 or later is needed"
}

# apt_dependency PACKAGE REGEX: the first package matching REGEX that PACKAGE's newest version
# depends on; nothing if there is none. After apt_lists PACKAGE.
apt_dependency() {
    apt-cache "${apt_options[@]}" show --no-all-versions "$1" |
        sed -n 's/^Depends: //p' | sed 's/[,|]/\n/g' | sed 's/^ *//; s/[ (:].*//' |
        awk -v wanted="$2" '!found && $0 ~ wanted { print; found = 1 }'
}

# apt_download PACKAGE DIR: downloads the package into DIR, hash verified; prints its path.
# After apt_lists.
apt_download() {
    local package=$1 dir=$2 deb
    # As root, apt would hand the download to the user _apt, who cannot write here.
    (cd "$dir" && apt-get "${apt_options[@]}" -o APT::Sandbox::User= -qq download "$package" >&2) ||
        die "could not download $package: no network, or stale package lists (run apt-get update)"
    for deb in "$dir/$package"_*.deb; do
        [ -f "$deb" ] && { echo "$deb"; return; }
    done
    die "apt downloaded no file for $package into $dir"
}
