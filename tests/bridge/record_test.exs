defmodule Tinkex.CustomLoss.RecordTest do
  # What a pool's Python processes record, and the command line's replay of it.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.TermError

  @moduletag timeout: 120_000
  @moduletag :tmp_dir

  @text "the quick brown fox"
  @terms Path.expand("../python/replayed_terms.py", __DIR__)

  defp datum do
    tokens = String.to_charlist(@text)

    %{
      model_input: %{chunks: [%{type: "encoded_text", tokens: Enum.drop(tokens, -1)}]},
      loss_fn_inputs: %{"target_tokens" => tl(tokens), "weights" => List.duplicate(1.0, 18)}
    }
  end

  defp logprobs, do: for(i <- 0..17, do: -0.1 * (i + 1))

  defp replay(file, args) do
    {:ok, python} = Tinkex.CustomLoss.Pool.Python.find(nil)
    root = Path.expand("../../python", __DIR__)

    System.cmd(python, ["-m", "tinker_custom_loss", "replay", file | args],
      env: [{"PYTHONPATH", root}],
      stderr_to_stdout: true
    )
  end

  test "a step that failed is reproduced from its file, one that did not is bit-equal", %{
    tmp_dir: dir
  } do
    run = Path.join(dir, "run")

    pool =
      start_pool!(
        load: [@terms],
        record: [dir: run, keep: {:every, 2}],
        await_ready: true
      )

    opts = [
      base_loss: :nll,
      regularizers: [%{name: "root", fn: "replayed_terms:root", weight: 0.5}]
    ]

    assert {:ok, output} = CustomLoss.compute(pool, [datum()], [logprobs()], [step: 0] ++ opts)
    assert {:ok, _} = CustomLoss.compute(pool, [datum()], [logprobs()], [step: 1] ++ opts)
    bad = List.replace_at(logprobs(), 6, 0.0)

    assert {:error, %TermError{datum: 0, token: [6]}} =
             CustomLoss.compute(pool, [datum()], [bad], [step: 3] ++ opts)

    steps = Path.join(run, "steps")
    assert Enum.sort(File.ls!(steps)) == ["00000000.safetensors", "00000003.safetensors"]

    assert length(String.split(File.read!(Path.join(run, "metrics.jsonl")), "\n", trim: true)) ==
             2

    assert File.read!(Path.join(run, "config.json")) =~ ~s("replayed_terms:root")

    load = ["--load", @terms, "--tokenizer", "bytes"]
    assert {said, 0} = replay(Path.join(steps, "00000000.safetensors"), load)

    assert said =~
             "bit-equal: the loss #{:erlang.float_to_binary(output.loss_total, decimals: 2)}"

    assert {said, 0} = replay(Path.join(steps, "00000003.safetensors"), load)
    assert said =~ "reproduced: NonFiniteError"
    assert said =~ "datum 0, token 6: the qui«c»k brown …"
  end

  test "what cannot be recorded so is refused when the pool is started" do
    for record <- [[], [dir: ""], [dir: "x", keep: :some], [dir: "x", keep_bytes: 0], "x"] do
      assert_raise ArgumentError, ~r/invalid value for :record .*expected \[dir: path\]/, fn ->
        CustomLoss.start_link(record: record)
      end
    end
  end
end
