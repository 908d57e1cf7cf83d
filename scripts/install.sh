#!/bin/sh
# Runs an installing command, once more after a pause when a download broke off: install.sh COMMAND...
set -u
pauses=${INSTALL_PAUSES-15 30 60 120 240} # seconds
broke_off='incomplete-download|download failed|ConnectionError|connection (broken|reset|aborted|interrupted|refused)'
broke_off="$broke_off|timed out|IncompleteRead|ProtocolError|name resolution|do not match the hashes|HTTP error 5"
broke_off="$broke_off|BadZipFile|located at .* is invalid"

log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
for pause in $pauses last; do
    "$@" 2>"$log"
    status=$?
    cat "$log" >&2
    if [ "$status" -eq 0 ] || [ "$pause" = last ] || ! grep -qiE "$broke_off" "$log"; then exit "$status"; fi
    echo "modelbatch: a download broke off; next try in $pause seconds" >&2
    sleep "$pause"
done
