defmodule Tinkex.CustomLoss.Test.SandboxServer do
  @moduledoc """
  A sandbox that serves HTTP, and compares its models with one that the official SDK trains.

  See tests/bridge/fixtures/sandbox.py.
  """

  import ExUnit.Assertions

  alias Tinkex.CustomLoss.Bridge
  alias Tinkex.CustomLoss.Pool.Python

  @doc "Starts one, with faults as JSON; it ends with the calling process."
  def start!(faults \\ "{}") do
    {:ok, python} = Python.find(nil)
    sources = Path.expand("../../../python", __DIR__)

    port =
      Port.open({:spawn_executable, python}, [
        :binary,
        {:line, 65_536},
        args: [Bridge.fixture("sandbox.py"), faults],
        env: [{~c"PYTHONPATH", to_charlist(sources)}, {~c"TINKER_TELEMETRY", ~c"0"}]
      ])

    assert_receive {^port, {:data, {:eol, url}}}, 60_000
    %{url: url, sandbox: port}
  end

  @doc "What a command comes to."
  def figures(sandbox, command) do
    Port.command(sandbox, command <> "\n")
    assert_receive {^sandbox, {:data, {:eol, figures}}}, 60_000
    figures |> String.split() |> Enum.map(&String.to_float/1)
  end
end
