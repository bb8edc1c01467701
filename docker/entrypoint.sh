#!/bin/sh
# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
#
# What the container runs: with a subcommand, that one; else every image in /images is served, and
# the arguments are further options of `nbdjobs serve`.
#
# exec makes nbdjobs the first process, which gets the engine's SIGTERM.
set -eu

readonly images="${NBDJOBS_IMAGES:-/images}"
readonly listen=0.0.0.0:10809

case ${1-} in
    '' | -*) ;;
    *) exec nbdjobs "$@" ;;
esac

set -- serve --tcp "$listen" "$@"
options=$#
for image in "$images"/*; do
    case $image in
        *.partial) continue ;;  # a backup that did not end
    esac
    if [ -f "$image" ] || [ -b "$image" ]; then
        set -- "$@" "$image"
    fi
done
if [ $# -eq "$options" ]; then
    echo "nbdjobs: there is no disk image in $images: mount a folder of raw images there" >&2
    exit 1
fi
exec nbdjobs "$@"
