#!/bin/sh
# First program of a guest that was made of a container image: does what a container's runtime does, then
# starts what the image's configuration says. Made by `howdah base import --oci`; the end of this file is
# the configuration.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH

say() { echo "howdah-init: $*"; }

# fs TYPE DIR [OPTIONS]
fs() {
    [ -d "$2" ] || mkdir -p "$2"
    mount -t "$1" ${3:+-o "$3"} "$1" "$2" || say "cannot mount $1 on $2"
}

file_systems() {
    command -v mount >/dev/null || {
        say "the image has no mount: what needs /proc, /sys or /dev will fail"
        return
    }
    [ -e /proc/self ] || fs proc /proc
    [ -e /sys/class ] || fs sysfs /sys
    [ -c /dev/null ] || fs devtmpfs /dev
    fs devpts /dev/pts gid=5,mode=620,ptmxmode=666
    fs tmpfs /dev/shm mode=1777
    fs tmpfs /run mode=755
    [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
    [ -e /dev/stdin ] || ln -s /proc/self/fd/0 /dev/stdin
    [ -e /dev/stdout ] || ln -s /proc/self/fd/1 /dev/stdout
    [ -e /dev/stderr ] || ln -s /proc/self/fd/2 /dev/stderr
}

network() {
    address='' gateway='' device=''
    [ -r /proc/cmdline ] || return
    read -r words </proc/cmdline
    set -f
    for word in $words; do
        case $word in
        howdah.ip=*) address=${word#*=} ;;
        howdah.gw=*) gateway=${word#*=} ;;
        esac
    done
    set +f
    for path in /sys/class/net/*; do
        case ${path##*/} in lo | '*') ;; *) device=${path##*/} && break ;; esac
    done
    if command -v ip >/dev/null; then
        ip link set lo up
        [ -n "$address" ] && [ -n "$device" ] || return
        ip link set "$device" up
        ip addr add "$address" dev "$device"
        [ -z "$gateway" ] || ip route add default via "$gateway"
    elif command -v ifconfig >/dev/null; then
        ifconfig lo 127.0.0.1 up
        [ -n "$address" ] && [ -n "$device" ] || return
        ifconfig "$device" "$address" up
        [ -z "$gateway" ] || route add default gw "$gateway"
    elif [ -n "$address" ]; then
        say "the image has neither ip nor ifconfig: $device has no address"
    fi
}

# Finds $user and $group, names or numbers, in the image's own lists: $uid, $gid, $name, $home.
identity() {
    uid='' gid='' name='' home=''
    case $user in *[!0-9]*) ;; *) uid=$user gid=0 ;; esac
    if [ -r /etc/passwd ]; then
        while IFS=: read -r own _ own_uid own_gid _ own_home _; do
            if [ "$own" = "$user" ] || [ "$own_uid" = "$user" ]; then
                uid=$own_uid gid=$own_gid name=$own home=$own_home
                break
            fi
        done </etc/passwd
    fi
    case $group in
    '') ;;
    *[!0-9]*)
        gid=''
        [ ! -r /etc/group ] || while IFS=: read -r own _ own_gid _; do
            [ "$own" != "$group" ] || gid=$own_gid
        done </etc/group
        ;;
    *) gid=$group ;;
    esac
    [ -n "$uid" ] && [ -n "$gid" ]
}

# Runs the words as $uid and $gid, by whatever there is that can.
as_user() {
    if setpriv --reuid "$uid" --regid "$gid" --clear-groups true 2>/dev/null; then
        setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@"
    elif chroot --userspec "$uid:$gid" --skip-chdir / true 2>/dev/null; then
        chroot --userspec "$uid:$gid" --skip-chdir / "$@"
    elif command -v su-exec >/dev/null; then
        su-exec "$uid:$gid" "$@"
    elif command -v gosu >/dev/null; then
        gosu "$uid:$gid" "$@"
    elif [ -n "$name" ] && [ -z "$group" ] && su -s /bin/sh -c true -- "$name" 2>/dev/null; then
        su -s /bin/sh -c 'exec "$@"' -- "$name" sh "$@"
    else
        say "nothing in the image starts a program as user $user (setpriv, chroot, su-exec, gosu, su)"
        return 126
    fi
}

run() {
    file_systems 2>&1
    [ ! -w /proc/sys/kernel/hostname ] || echo howdah >/proc/sys/kernel/hostname
    network 2>&1
    environment
    identity || {
        say "the image has no user $user${group:+ or no group $group}"
        return 126
    }
    [ -n "${HOME:-}" ] || HOME=${home:-/}
    export HOME
    [ -d "$directory" ] || mkdir -p "$directory"
    cd "$directory" || return 126
    say "starting $1"
    if [ "$uid:$gid" = 0:0 ]; then "$@"; else as_user "$@"; fi
}

# When it has ended there is nothing left to do: the guest resets, and its VM ends.
main() {
    run "$@"
    say "$1 ended with exit code $?"
    sync
    mount -o remount,ro / 2>/dev/null
    [ -w /proc/sysrq-trigger ] || exit
    echo b >/proc/sysrq-trigger
}

