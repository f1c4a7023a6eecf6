#!/usr/bin/env bash
# Checks the types of the Elixir side with dialyzer. What it knows of OTP and Elixir is kept in .make,
# and takes minutes to find out, once for each version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v dialyzer >/dev/null || {
    echo 'dialyzer is not on PATH: it is a part of OTP, on Debian the package erlang-dialyzer' >&2
    exit 1
}

read -r version lib < <(elixir -e '
    lib = Path.dirname(to_string(:code.lib_dir(:elixir)))
    IO.puts("#{System.version()}-#{System.otp_release()} #{Path.expand(lib)}")')
plt=.make/dialyzer-$version.plt
# Where dialyzer finds who can read what the Elixir compiler left for it.
export ERL_LIBS=$lib
export MIX_BUILD_PATH=$PWD/.make/dialyzer-$version

mkdir -p .make
if [[ ! -f $plt ]]; then
    dialyzer --build_plt --output_plt "$plt.part" --apps erts kernel stdlib crypto \
        -r "$lib"/{elixir,logger,mix}/ebin
    mv "$plt.part" "$plt"
fi
MIX_ENV=prod mix compile
dialyzer --plt "$plt" -r "$MIX_BUILD_PATH/lib/tinkex_custom_loss/ebin"
