defmodule Tinkex.CustomLoss.Faults.ChaosTest do
  # The short form of make chaos.
  use ExUnit.Case, async: false

  alias Tinkex.CustomLoss.Test.Chaos

  @moduletag timeout: 120_000

  test "calls from 32 processes under faults of every kind: one right answer each, nothing left" do
    result = Chaos.run(calls: 600, seed: 4, seconds: 30, fatal: 4)
    assert %{wrong: 0, orphans: 0, examples: []} = result
    assert result.answers == result.calls
    # However many there were in the time.
    assert result.outcomes.right > result.calls / 2
  end
end
