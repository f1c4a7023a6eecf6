defmodule Tinkex.CustomLoss.LiveTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO

  alias Tinkex.CustomLoss.{Live, Output}

  defp record(step, names \\ ["kl"]) do
    value = 4.0 / (1 + step)

    term = %{
      "value" => value,
      "weight" => 0.5,
      "contribution" => 0.5 * value,
      "grad_norm_weighted" => 0.25,
      "cosine_to_total" => -0.5
    }

    %{
      "loss_total" => 2 * value,
      "total_grad_norm" => 1.5,
      "base_loss" => %{"value" => value, "grad_norm" => 1.0, "cosine_to_total" => 0.75},
      "regularizers" => Map.new(names, &{&1, term})
    }
  end

  defp shown(records, opts) do
    capture_io(fn -> assert records |> Live.watch(opts) |> Enum.to_list() == records end)
  end

  test "without a terminal there are plain lines, and the table at the end" do
    lines = for(step <- 0..23, do: record(step)) |> shown(total: 24, ansi: false) |> lines()
    assert hd(lines) == "    0  loss 8 = base_loss 4 + kl 2"
    assert Enum.count(lines, &(&1 =~ ~r/^ +\d+  loss/)) == 12

    assert [heads, base, kl] = Enum.take(lines, -3)
    assert String.split(heads) == ~w(term value weight w·value share w·|∇| cos trend)
    assert base =~ ~r/^base_loss 0\.1667 +0\.1667 █████▍ +1 \+0\.75 [▁▂▃▄▅▆▇█]{10}$/u
    assert kl =~ ~r/^kl +0\.1667 +0\.5 0\.08333 ██▋ +0\.25 -0\.50 [▁▂▃▄▅▆▇█]{10}$/u
  end

  test "no line is longer than 80 columns, and what is left out is counted" do
    names = for index <- 1..12, do: "a_regularizer_with_a_long_name_#{index}"
    lines = [record(0, names)] |> shown(ansi: false) |> lines()
    assert Enum.max(Enum.map(lines, &String.length/1)) <= 80
    left_out = 13 - (hd(lines) |> String.split(" + ") |> Enum.count(&(&1 =~ "_")))
    assert hd(lines) =~ "+ #{left_out} more"

    very_long = String.duplicate("x", 90)
    assert [line | _] = [record(0, [very_long])] |> shown(ansi: false) |> lines()
    assert String.ends_with?(line, "= base_loss 4 + 1 more")
  end

  test "a row of the table fits as well, whatever its figures" do
    wide = %{
      "value" => -0.00012341,
      "weight" => -0.00012341,
      "contribution" => -0.00012341,
      "grad_norm_weighted" => 1.0e-12,
      "skipped" => true
    }

    record = put_in(record(0)["regularizers"]["a_regularizer_with_a_long_name"], wide)
    lines = for(_ <- 1..24, do: record) |> shown(ansi: false) |> lines()
    assert Enum.max(Enum.map(lines, &String.length/1)) <= 80
    assert List.last(lines) =~ "skipped" or Enum.at(lines, -2) =~ "skipped"
  end

  test "the time that is left is that of the steps so far, where the number of steps is known" do
    heading = fn opts ->
      a_minute_ago = System.monotonic_time(:millisecond) - 60_000

      capture_io(fn -> Live.put(%{Live.new(opts) | started: a_minute_ago}, record(0)) end)
      |> String.replace(~r/\e\[[0-9;]*[A-Za-z]/, "")
      |> lines()
      |> hd()
    end

    assert heading.(total: 4, ansi: true) == "1/4 steps  loss 8  ▁  |∇| 1.5  3:00 left"
    assert heading.(ansi: true) == "step 1  loss 8  ▁  |∇| 1.5"
  end

  test "on a terminal the table is drawn over the one before" do
    drawn = shown([record(0), record(1)], total: 2, ansi: true)
    assert [_first, second] = String.split(drawn, IO.ANSI.cursor_up(4))
    plain = String.replace(second, ~r/\e\[[0-9;]*[A-Za-z]/, "")
    assert ["2/2 steps  loss 4  █▁  |∇| 1.5  0:00 left", _heads, _base, _kl] = lines(plain)
    assert second =~ IO.ANSI.red() <> "-0.50"
  end

  # A device that says how wide it is, and what was written to it.
  defp terminal(columns) do
    {:ok, written} = StringIO.open("")
    {spawn_link(fn -> answer(columns, written) end), written}
  end

  defp answer(columns, written) do
    receive do
      {:io_request, from, reply_as, {:get_geometry, :columns}} ->
        send(from, {:io_reply, reply_as, columns})

      request ->
        send(written, request)
    end

    answer(columns, written)
  end

  test "a narrow terminal is shown fewer columns, since a row that is wrapped is not drawn over" do
    for {columns, heads} <- [
          {80, ~w(term value weight w·value share w·|∇| cos trend)},
          {60, ~w(term value weight w·value share w·|∇| cos)},
          {55, ~w(term value weight w·value w·|∇| cos trend)},
          {50, ~w(term value weight w·value w·|∇| cos)},
          {30, ~w(term w·value cos)},
          {26, ~w(term w·value)}
        ] do
      {device, written} = terminal(columns)
      records = for step <- 1..24, do: record(step, ["a_regularizer_with_a_long_name"])
      records |> Live.watch(device: device, ansi: true, total: 24) |> Stream.run()

      {_input, drawn} = StringIO.contents(written)
      lines = drawn |> String.replace(~r/\e\[[0-9;]*[A-Za-z]/, "") |> lines()
      assert Enum.max(Enum.map(lines, &String.length/1)) <= columns
      assert lines |> Enum.at(-3) |> String.split() == heads
    end
  end

  test "outputs are shown as records are, and what is no number is told" do
    odd = put_in(record(1)["base_loss"]["value"], :nan)
    odd = put_in(odd["regularizers"]["kl"]["skipped"], true)

    text =
      capture_io(fn ->
        Live.new(ansi: false)
        |> Live.put(%Output{loss_total: 8.0, gradients: nil, record: record(0)})
        |> Live.put(%{odd | "loss_total" => :infinity})
        |> Live.finish()
      end)

    assert text =~ "base_loss   nan"
    assert text =~ "skipped"
    assert text =~ "▁?"
  end

  test "a wrong option is refused" do
    assert_raise ArgumentError, ~r/:total/, fn -> Live.new(total: 0) end
  end

  defp lines(text), do: text |> String.trim_trailing() |> String.split("\n")
end
