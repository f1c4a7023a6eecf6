defmodule Tinkex.CustomLoss.ExamplesTest do
  # The examples on a terminal, as they are run by hand.
  use ExUnit.Case, async: true

  @moduletag timeout: 180_000

  @root Path.expand("../..", __DIR__)

  # script(1) is the terminal, of so many columns. What it shows comes as messages.
  defp start(example, columns, args \\ "") do
    command =
      "stty cols #{columns} rows 40; exec scripts/demo.sh docs/examples/#{example} #{args}"

    Port.open({:spawn_executable, System.find_executable("script")}, [
      :binary,
      :exit_status,
      cd: @root,
      args: ["--quiet", "--return", "--command", command, "/dev/null"],
      env: [{~c"TERM", ~c"xterm"}, {~c"SHELL", ~c"/bin/sh"}]
    ])
  end

  # Presses Ctrl-C as soon as `press?` is true of what is shown. Returns that, and the status.
  defp watch(terminal, press?, shown \\ "") do
    receive do
      {^terminal, {:data, more}} ->
        shown = shown <> more

        if press?.(shown) do
          Port.command(terminal, <<3>>)
          watch(terminal, fn _shown -> false end, shown)
        else
          watch(terminal, press?, shown)
        end

      {^terminal, {:exit_status, status}} ->
        {shown, status}
    after
      120_000 -> flunk("nothing more after #{inspect(shown)}")
    end
  end

  # Lines as they are drawn, without what moves the cursor or colours them.
  defp lines(shown) do
    ~r/\e\[[0-9;]*[A-Za-z]|\r/ |> Regex.replace(shown, "") |> String.split("\n")
  end

  test "Ctrl-C ends the demo after the step that it is at" do
    {shown, status} = "demo.exs" |> start(80) |> watch(&(&1 =~ "2/120 steps"))
    assert status == 130
    lines = lines(shown)
    assert shown =~ ~r/stopped after \d+ of 120 steps/
    refute shown =~ "BREAK"
    assert Enum.all?(lines, &(String.length(&1) <= 80))

    # Each time it is drawn, it is whole, and over the one before.
    drawn = Enum.count(lines, &(&1 =~ ~r{\d+/120 steps}))
    assert drawn >= 2

    for row <- ["term ", "base_loss", "l2", "rarity", "smoothness", "surprise"],
        do: assert(Enum.count(lines, &String.starts_with?(&1, row)) == drawn)

    assert length(Regex.scan(~r/\e\[7A/, shown)) == drawn - 1
  end

  test "GRPO raises the reward, keeps the KL, and is resumed bit for bit" do
    {shown, status} = "grpo.exs" |> start(120, 16) |> watch(fn _shown -> false end)
    assert shown =~ "16/16 steps"
    assert shown =~ "yes  the resumed run has the same parameters, bit for bit"
    assert status == 0
    # A line of the log would be drawn over.
    refute shown =~ "[warning]"
    assert Enum.all?(lines(shown), &(String.length(&1) <= 80))
  end
end
