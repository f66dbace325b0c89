#!/usr/bin/env bash
# fuzz.sh TIME [PACKAGE…]: every fuzz target of the packages (default: all below internal/), one after
# the other, for TIME each. Goes on after a find and ends with status 1 if there was any; Go writes the
# input that failed to the package's testdata/fuzz, to be committed with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: fuzz.sh TIME [PACKAGE…]}; shift
ran=0 found=0
for pkg in $(go list "${@:-./internal/...}"); do
  for target in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
    echo "== ${pkg##*/} $target for $time"
    ran=$((ran + 1))
    # New inputs are made small by ten tries, not for the minute each that Go takes: with slow targets nothing else would be done.
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "$pkg" || found=$((found + 1))
  done
done
echo "$ran fuzz targets, $found with a find"
[ "$ran" -gt 0 ] && [ "$found" -eq 0 ]
