defmodule Tinkex.CustomLoss.ReadmeTest do
  # Changes the working directory.
  use ExUnit.Case, async: false

  @readme Path.expand("../../README.md", __DIR__)

  # Each code block with the number of lines above it.
  defp blocks(language) do
    text = File.read!(@readme)

    for [{start, length}] <-
          Regex.scan(~r/^```#{language}\n\K.*?(?=^```$)/ms, text, return: :index) do
      above = text |> binary_part(0, start) |> String.split("\n") |> length()
      {above - 1, binary_part(text, start, length)}
    end
  end

  @tag :tmp_dir
  test "the Elixir blocks run in order, on the Python files shown beside them", %{tmp_dir: dir} do
    for {_, code} <- blocks("python"), [_, name] <- [Regex.run(~r/\A# (\w+\.py)\n/, code)] do
      File.write!(Path.join(dir, name), code)
    end

    programs = blocks("elixir")
    assert programs != []

    bindings =
      File.cd!(dir, fn ->
        Enum.reduce(programs, [], fn {above, code}, bindings ->
          {_, bindings} = Code.eval_string(code, bindings, file: @readme, line: above + 1)
          bindings
        end)
      end)

    record = bindings[:output].telemetry
    assert_in_delta record["loss_total"], 5.0419, 5.0e-5
    assert_in_delta record["regularizers"]["smoothness"]["contribution"], 0.268, 5.0e-5
  end
end
