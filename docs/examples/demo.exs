# Trains a small language model on a text, from Elixir:
#
#     mix run docs/examples/demo.exs [TEXT]
#
# Every step's loss is composed of a base loss and three regularizers, a built-in one and two of
# demo_terms.py, one of them async. PyTorch composes and differentiates it in a Python process of
# its own; the model answers from another one. At the end the parameter gradient of the linearized
# loss, which is what a Tinker server computes, is compared with autograd from end to end.

defmodule Demo do
  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Sandbox

  @steps 120
  @seconds 40
  @show_every 10
  @sequences 16
  @length 64
  @tolerance 1.0e-5

  @terms Path.join(__DIR__, "demo_terms.py")

  @loss [
    base_loss: {:nll, %{reduction: "token_mean"}},
    regularizers: [
      %{name: "l2", fn: :l2, weight: 0.02, params: %{reduction: "token_mean"}},
      %{name: "smoothness", fn: "demo_terms:smoothness", weight: 0.05},
      %{name: "rarity", fn: "demo_terms:rarity", weight: 0.2}
    ]
  ]

  def run(argv) do
    path = List.first(argv) || System.get_env("TEXT") || Path.join(__DIR__, "../../LICENSE")

    case File.read(path) do
      {:ok, text} when byte_size(text) > @length -> run(path, text)
      {:ok, _} -> refuse("#{path} is too short: more than #{@length} bytes are needed")
      {:error, reason} -> refuse("#{path} cannot be read: #{:file.format_error(reason)}")
    end
  end

  defp refuse(sentence) do
    IO.puts(:stderr, sentence)
    2
  end

  defp run(path, text) do
    IO.puts(
      "#{Path.basename(path)}: #{byte_size(text)} bytes; " <>
        "#{@sequences} pieces of #{@length} bytes a step"
    )

    IO.puts("step, loss_total = value → contribution (weight · value), |∇| w.r.t. the logprobs\n")

    :rand.seed(:exsss, 0)

    {:ok, _} =
      Supervisor.start_link([{CustomLoss, name: Demo.Loss, load: [@terms]}],
        strategy: :one_for_one
      )

    {:ok, model} = Sandbox.start_link(seed: 0, load: [@terms])

    seen = train(model, text, System.monotonic_time(:second) + @seconds, [])
    [last | _] = seen
    first = List.last(seen)
    IO.puts("")
    table(first, last)

    {:ok, check} = Sandbox.check_gradient(model, batch(text), @loss)
    difference = check.max_abs_difference

    IO.puts(
      "\nloss #{fixed(first["loss_total"])} -> #{fixed(last["loss_total"])}, " <>
        "#{length(seen)} steps, gradient check #{:erlang.float_to_binary(difference, scientific: 1)}"
    )

    if last["loss_total"] < first["loss_total"] and difference <= @tolerance, do: 0, else: 1
  end

  # The metrics of all steps, the last one first.
  defp train(model, text, until, seen) do
    step = length(seen)

    if step < @steps and System.monotonic_time(:second) < until do
      {:ok, task} =
        CustomLoss.forward_backward_custom(
          Demo.Loss,
          {Sandbox, model},
          batch(text),
          @loss ++ [step: step]
        )

      {:ok, output} = Task.await(task, :infinity)
      {:ok, task} = Sandbox.optim_step(model, learning_rate: 0.01)
      {:ok, _} = Task.await(task, :infinity)
      if rem(step, @show_every) == 0, do: show(step, output.metrics)
      train(model, text, until, [output.metrics | seen])
    else
      seen
    end
  end

  # Random pieces of the text; the target of each byte is the byte behind it.
  defp batch(text) do
    for _ <- 1..@sequences do
      start = :rand.uniform(byte_size(text) - @length) - 1
      tokens = :binary.bin_to_list(text, start, @length)
      targets = :binary.bin_to_list(text, start + 1, @length)

      %{
        model_input: tokens,
        loss_fn_inputs: %{"target_tokens" => targets, "weights" => List.duplicate(1.0, @length)}
      }
    end
  end

  defp show(step, metrics) do
    base = metrics["base_loss"]

    cells = [
      "nll #{fixed(base["value"], 3)} |∇| #{fixed(base["grad_norm"], 3)}"
      | for {name, term} <- terms(metrics) do
          "#{name} #{fixed(term["value"], 3)} → #{fixed(term["contribution"], 3)} " <>
            "|∇| #{fixed(term["grad_norm"], 3)}"
        end
    ]

    step = String.pad_leading("#{step}", 4)
    total = String.pad_leading(fixed(metrics["loss_total"]), 8)
    IO.puts("#{step} #{total} = #{Enum.join(cells, " + ")}")
  end

  defp table(first, last) do
    row(["term", "weight", "first", "last", "contribution", "|∇|"])

    base =
      Map.merge(last["base_loss"], %{
        "weight" => 1.0,
        "contribution" => last["base_loss"]["value"]
      })

    before = Map.put(first["regularizers"], "nll", first["base_loss"])

    for {name, term} <- [{"nll", base} | terms(last)] do
      row([
        name,
        fixed(term["weight"], 3),
        fixed(before[name]["value"]),
        fixed(term["value"]),
        fixed(term["contribution"]),
        fixed(term["grad_norm"])
      ])
    end
  end

  defp row([name | cells]) do
    IO.puts([
      String.pad_trailing(name, 12)
      | for(
          {cell, width} <- Enum.zip(cells, [8, 10, 10, 14, 10]),
          do: String.pad_leading(cell, width)
        )
    ])
  end

  defp terms(metrics),
    do: for(%{name: name} <- @loss[:regularizers], do: {name, metrics["regularizers"][name]})

  defp fixed(number, decimals \\ 4), do: :erlang.float_to_binary(number / 1, decimals: decimals)
end

System.halt(Demo.run(System.argv()))
