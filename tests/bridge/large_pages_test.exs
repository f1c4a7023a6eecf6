defmodule Tinkex.CustomLoss.LargePagesTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss

  import Tinkex.CustomLoss.Bridge

  @setting "/sys/kernel/mm/transparent_hugepage/enabled"
  @for_the_asking? match?({:ok, _}, File.read(@setting)) and File.read!(@setting) =~ "[madvise]"

  defp mebibytes(options) do
    options = [load: [fixture("large_pages.py")]] ++ options
    {:ok, pool} = CustomLoss.start_link(options)
    {:ok, output} = CustomLoss.compute(pool, nil, [[-1.0]], base_loss: "large_pages:large_pages")
    output.record["base_loss"]["custom"]["mebibytes"]
  end

  @tag skip: not @for_the_asking? && "Linux gives no large pages to those that ask for them"
  test "a worker's tensors lie in large pages, unless its environment says otherwise" do
    assert mebibytes([]) >= 60
    assert mebibytes(env: [{"THP_MEM_ALLOC_ENABLE", "0"}]) < 60
  end
end
