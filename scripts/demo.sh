#!/bin/sh
# Runs an example, which Ctrl-C ends: scripts/demo.sh docs/examples/demo.exs
#
# The BEAM cannot catch Ctrl-C: it is told to ignore it, and gets a hangup instead, which the example
# catches. In the background, a shell goes on waiting, and so can pass it on.
ELIXIR_ERL_OPTIONS="$ELIXIR_ERL_OPTIONS +Bi" mix run "$@" &
demo=$!
trap 'kill -HUP $demo 2>/dev/null' INT
while wait $demo; status=$?; kill -0 $demo 2>/dev/null; do :; done
exit $status
