defmodule Tinkex.CustomLoss.Faults.ClusterTest do
  # The module of docs/reliability.md, with both members of the group on this node.
  use ExUnit.Case, async: false

  import Tinkex.CustomLoss.Bridge

  @guide Path.expand("../../../docs/reliability.md", __DIR__)

  setup_all do
    [[_, code]] = Regex.scan(~r/^```elixir\n(.*?)^```$/ms, File.read!(@guide))
    # The guides are run elsewhere, too.
    forget = fn -> {:code.delete(MyLosses), :code.purge(MyLosses)} end
    forget.()
    [{module, _}] = Code.compile_string(code, @guide)
    on_exit(forget)
    start_supervised!(%{id: :pg, start: {:pg, :start_link, []}})
    %{losses: module}
  end

  test "a group of pools is called through :pg; one that ends leaves it", %{losses: module} do
    opts = [python: fixture("behaves.py"), await_ready: true]

    for id <- [:one, :other],
        do: start_supervised!(Supervisor.child_spec({module, opts}, id: id))

    assert length(:pg.get_members(module)) == 2

    for step <- 1..6 do
      assert {:ok, %{loss_total: loss}} =
               module.compute(nil, [[-1.0]], base_loss: :l2, step: step)

      assert loss == step * 1.0
    end

    stop_supervised!(:one)
    eventually(fn -> length(:pg.get_members(module)) == 1 end)
    assert {:ok, %{loss_total: 7.0}} = module.compute(nil, [[-1.0]], base_loss: :l2, step: 7)
  end
end
