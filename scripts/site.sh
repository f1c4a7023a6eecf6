#!/bin/sh
# site.sh PYTHON: builds docs/ as a site, and says nothing unless something is wrong with it. mkdocs
# has --quiet, but counts no warning then, so that --strict lets broken links pass.
said=$(NO_MKDOCS_2_WARNING=1 "$1" -m mkdocs build --strict 2>&1) || {
    printf '%s\n' "$said" | grep -v '^INFO' >&2
    exit 1
}
