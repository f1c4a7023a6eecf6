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

  # Two hundred: make replays.
  @replays String.to_integer(System.get_env("REPLAYS", "20"))

  @program """
  import logging, sys
  logging.disable()  # what it says of terms that are skipped
  from tinker_custom_loss.insight import kept_steps, read_step, replay
  for file in kept_steps(sys.argv[1]):
      again = replay(file, load=[sys.argv[2]])
      outcome = read_step(file).outcome
      loss = "failed" if outcome is None or outcome.error else repr(float(outcome.loss_total))
      print(read_step(file).step, again.is_same and not again.changes, loss)
  """

  @tag :replays
  @tag timeout: 600_000
  test "random compositions come out bit-equal", %{tmp_dir: dir} do
    run = Path.join(dir, "run")
    pool = start_pool!(load: [@terms], record: [dir: run, keep: :all], await_ready: true)
    :rand.seed(:exsss, 11)

    losses =
      for step <- 0..(@replays - 1) do
        {data, logprobs, opts} = composition(step)

        case CustomLoss.compute(pool, data, logprobs, opts) do
          {:ok, output} -> output.loss_total
          {:error, %TermError{}} -> :failed
        end
      end

    {:ok, python} = Tinkex.CustomLoss.Pool.Python.find(nil)
    env = [{"PYTHONPATH", Path.expand("../../python", __DIR__)}]
    {said, 0} = System.cmd(python, ["-c", @program, run, @terms], env: env)
    told = said |> String.split("\n", trim: true) |> Enum.map(&String.split/1)
    assert length(told) == @replays

    for {[number, same, loss], {expected, step}} <- Enum.zip(told, Enum.with_index(losses)) do
      assert {number, same} == {"#{step}", "True"}
      assert loss == "#{expected}" or String.to_float(loss) == expected
    end

    # Both kinds are among them.
    assert Enum.count(losses, &is_float/1) > @replays / 2
    assert :failed in losses
  end

  defp composition(step) do
    data = for length <- some(4, fn -> pick(2..18) end), do: datum(length)
    # A batch has one dtype.
    dtype = any([:list, :float64, :float32, :float16, :bfloat16])
    logprobs = for datum <- data, do: logprobs(length(datum.model_input), dtype)
    # One that no term can bear, unless it is told to.
    logprobs = if pick(1..4) == 1, do: [not_finite(hd(logprobs)) | tl(logprobs)], else: logprobs
    base = any([nil, :nll, :importance_sampling, "replayed_terms:likelihood"])

    regularizers =
      for {fun, i} <- Enum.with_index(some(4, &term/0)) do
        Map.merge(%{run_in_executor: any([true, false])}, fun)
        |> Map.merge(%{
          name: "term #{i}",
          weight: any([:rand.normal(), fn step -> step / 10 end]),
          on_non_finite: any([:raise, :skip, :zero]),
          on_error: any([:raise, :skip])
        })
      end

    {data, logprobs, [base_loss: base, regularizers: regularizers, step: step]}
  end

  defp term do
    any([
      %{fn: any([:nll, :dft, :focal, :entropy, :l1, :l2, :elastic_net])},
      %{fn: any([:nll, :kl, :proximal]), reduction: any([:token_sum, :token_mean])},
      %{fn: :kl, params: %{estimator: any(["k1", "k2", "k3"])}},
      %{fn: "replayed_terms:spread"},
      # In a thread it would draw before or after another, as it happens.
      %{fn: "replayed_terms:draws", run_in_executor: false}
    ])
  end

  defp datum(length) do
    floats = fn -> for _ <- 1..length, do: :rand.normal() end

    %{
      model_input: for(_ <- 1..length, do: pick(0..255)),
      loss_fn_inputs: %{
        "target_tokens" => for(_ <- 1..length, do: pick(0..255)),
        "weights" => for(_ <- 1..length, do: any([0.0, 1.0, 0.5])),
        "reference_logprobs" => Enum.map(floats.(), &(-abs(&1))),
        "logprobs" => Enum.map(floats.(), &(-abs(&1))),
        "advantages" => floats.()
      }
    }
  end

  defp logprobs(length, dtype) do
    values = for _ <- 1..length, do: -3 * :rand.uniform()

    if dtype == :list,
      do: values,
      else: {IO.iodata_to_binary(bytes(values, dtype)), [length], dtype}
  end

  defp bytes(values, :float64), do: for(x <- values, do: <<x::float-64-little>>)
  defp bytes(values, :float32), do: for(x <- values, do: <<x::float-32-little>>)
  defp bytes(values, :float16), do: for(x <- values, do: <<x::float-16-little>>)
  # From -0.5 to -2.
  defp bytes(values, :bfloat16), do: for(_ <- values, do: <<0xBF00 + pick(0..255)::16-little>>)

  @nan %{
    float64: <<0x7FF8000000000000::64-little>>,
    float32: <<0x7FC00000::32-little>>,
    float16: <<0x7E00::16-little>>,
    bfloat16: <<0x7FC0::16-little>>
  }
  defp not_finite([_first | rest]), do: [any([:nan, :infinity, :neg_infinity]) | rest]

  defp not_finite({bytes, shape, dtype}) do
    size = byte_size(@nan[dtype])
    <<_first::binary-size(size), rest::binary>> = bytes
    {@nan[dtype] <> rest, shape, dtype}
  end

  defp some(most, fun), do: for(_ <- 1..pick(1..most), do: fun.())
  defp any(values), do: Enum.random(values)
  defp pick(range), do: Enum.random(range)

  test "what cannot be recorded so is refused when the pool is started" do
    for record <- [[], [dir: ""], [dir: "x", keep: :some], [dir: "x", keep_bytes: 0], "x"] do
      assert_raise ArgumentError, ~r/invalid value for :record .*expected \[dir: path\]/, fn ->
        CustomLoss.start_link(record: record)
      end
    end
  end
end
