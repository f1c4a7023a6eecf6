# Trains a small language model on a text, from Elixir:
#
#     mix run docs/examples/demo.exs [TEXT]
#
# Ctrl-C asks the BEAM for its menu, and cannot be caught there; `make demo` turns it into a hangup,
# at which the training stops after the step that it is at.
#
# Every step's loss is composed of a base loss and four regularizers: a catalogue term, and three of
# demo_terms.py, one written with @term and one async. PyTorch composes and differentiates it in a
# Python process of its own; the model answers from another one. At the end the parameter gradient of the linearized
# loss, which is what a Tinker server computes, is compared with autograd from end to end.

defmodule Demo do
  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Live, Sandbox}

  @steps 120
  @seconds 40
  @sequences 16
  @length 64
  @tolerance 1.0e-5

  @terms Path.join(__DIR__, "demo_terms.py")

  @loss [
    base_loss: %{fn: :nll, reduction: :token_mean},
    regularizers: [
      %{fn: :l2, weight: 0.02, reduction: :token_mean},
      %{name: "surprise", fn: "demo_terms:surprise", weight: 0.1, reduction: :token_mean},
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
        "#{@sequences} pieces of #{@length} bytes a step\n"
    )

    :rand.seed(:exsss, 0)
    stopped = :atomics.new(1, [])
    {:ok, _} = System.trap_signal(:sighup, fn -> :atomics.put(stopped, 1, 1) end)

    {:ok, _} =
      Supervisor.start_link([{CustomLoss, name: Demo.Loss, load: [@terms]}],
        strategy: :one_for_one
      )

    {:ok, model} = Sandbox.start_link(seed: 0, load: [@terms])

    seen =
      model
      |> steps(text, System.monotonic_time(:second) + @seconds, stopped)
      |> Live.watch(total: @steps)
      |> Enum.to_list()

    if :atomics.get(stopped, 1) == 1, do: interrupted(seen), else: judge(model, text, seen)
  end

  # As a program that Ctrl-C ended.
  defp interrupted(seen) do
    IO.puts("\nstopped after #{length(seen)} of #{@steps} steps")
    130
  end

  defp judge(model, text, seen) do
    first = List.first(seen)
    last = List.last(seen)

    {:ok, check} = Sandbox.check_gradient(model, batch(text), @loss)
    difference = check.max_abs_difference

    IO.puts(
      "\nloss #{fixed(first["loss_total"])} -> #{fixed(last["loss_total"])}, " <>
        "#{length(seen)} steps, gradient check #{:erlang.float_to_binary(difference, scientific: 1)}"
    )

    if last["loss_total"] < first["loss_total"] and difference <= @tolerance, do: 0, else: 1
  end

  # The metrics of one step after another.
  defp steps(model, text, until, stopped) do
    Stream.unfold(0, fn step ->
      if step < @steps and System.monotonic_time(:second) < until and
           :atomics.get(stopped, 1) == 0,
         do: {train(model, batch(text), step), step + 1}
    end)
  end

  defp train(model, data, step) do
    options = @loss ++ [step: step]

    {:ok, task} = CustomLoss.forward_backward_custom(Demo.Loss, {Sandbox, model}, data, options)

    {:ok, output} = Task.await(task, :infinity)
    {:ok, task} = Sandbox.optim_step(model, learning_rate: 0.01)
    {:ok, _} = Task.await(task, :infinity)
    output.metrics
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

  defp fixed(number), do: :erlang.float_to_binary(number / 1, decimals: 4)
end

System.halt(Demo.run(System.argv()))
