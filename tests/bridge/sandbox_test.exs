defmodule Tinkex.CustomLoss.SandboxTest do
  # The real model, in a Python process of its own.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge, only: [alive?: 1, eventually: 1]

  alias Tinkex.CustomLoss.{RequestError, Sandbox, WorkerError}

  @text :binary.bin_to_list("the cat sat on the mat, and the dog sat on the log. ")

  defp datum(tokens, targets, weights) do
    %{
      model_input: %{chunks: [%{type: "encoded_text", tokens: tokens}]},
      loss_fn_inputs: %{"target_tokens" => targets, "weights" => weights}
    }
  end

  # One datum of the shape [T], one of [T, 2].
  defp data do
    [
      datum(Enum.drop(@text, -1), Enum.drop(@text, 1), List.duplicate(0.02, length(@text) - 1)),
      datum([1, 2], [[2, 7], [3, 7]], [[0.01, 0.02], [-0.01, 0.0]])
    ]
  end

  # One model for the tests that leave it as it is: to import torch takes seconds.
  setup_all do
    %{pid: start_supervised!({Sandbox, name: __MODULE__.Named})}
  end

  defp await({:ok, task}), do: Task.await(task, 60_000)
  defp start!(opts \\ []), do: start_supervised!({Sandbox, opts}, id: make_ref())

  defp os_pid(pid) do
    {:os_pid, os_pid} = Port.info(:sys.get_state(pid).port, :os_pid)
    os_pid
  end

  test "trains, the same model under the same seed, in the order of the calls" do
    awaited = start!(seed: 7)

    losses =
      for _ <- 1..20 do
        {:ok, output} = await(Sandbox.forward_backward(awaited, data(), :cross_entropy))
        {:ok, _} = await(Sandbox.optim_step(awaited, %{learning_rate: 0.01}))
        output.metrics["loss:sum"]
      end

    assert List.last(losses) < 0.5 * hd(losses)

    pipelined = start!(seed: 7)

    tasks =
      for _ <- 1..20,
          {:ok, task} <- [
            Sandbox.forward_backward(pipelined, data(), :cross_entropy),
            Sandbox.optim_step(pipelined, learning_rate: 0.01)
          ],
          do: task

    assert Enum.all?(Task.await_many(tasks, 60_000), &match?({:ok, _}, &1))
    assert {:ok, {parameters, [count]}} = Sandbox.parameters(awaited)
    assert byte_size(parameters) == 4 * count
    assert {:ok, {^parameters, [^count]}} = Sandbox.parameters(pipelined)
  end

  test "is another model under another seed", %{pid: pid} do
    assert Sandbox.parameters(start!(seed: 8)) != Sandbox.parameters(pid)
  end

  test "answers in the form of Tinkex's outputs", %{pid: pid} do
    {:ok, output} = await(Sandbox.forward(pid, data(), "cross_entropy", []))
    assert output.loss_fn_output_type == "ArrayRecord"
    [first, second] = output.loss_fn_outputs
    targets = length(@text) - 1

    assert %{"logprobs" => %{"data" => logprobs, "dtype" => "float32", "shape" => [^targets]}} =
             first

    assert Enum.all?(logprobs, &(&1 < 0.0))
    assert second["logprobs"]["shape"] == [2, 2]
    [a, b, c, d] = second["logprobs"]["data"]
    loss = -0.02 * Enum.sum(logprobs) - 0.01 * a - 0.02 * b + 0.01 * c - 0.0 * d
    assert_in_delta output.metrics["loss:sum"], loss, 1.0e-4
  end

  test "accumulates gradients until a step, and forward none", %{pid: pid} do
    {:ok, _} = await(Sandbox.forward(pid, data(), :cross_entropy))
    assert {:ok, {zeros, [count]}} = Sandbox.parameter_gradients(pid)
    assert zeros == <<0::size(count)-unit(32)>>
    {:ok, _} = await(Sandbox.forward_backward(pid, data(), :cross_entropy))
    assert {:ok, {gradients, _}} = Sandbox.parameter_gradients(pid)
    assert gradients != zeros
    {:ok, _} = await(Sandbox.optim_step(pid, %{learning_rate: 0}))
    assert {:ok, {^zeros, _}} = Sandbox.parameter_gradients(pid)
  end

  test "computes the losses of the service", %{pid: pid} do
    old = [%{"logprobs" => List.duplicate(-6.0, 3), "advantages" => [1.0, -2.0, 0.5]}]

    data =
      for inputs <- old, do: datum([1, 2, 3], [2, 3, 4], [1.0, 1.0, 1.0]) |> put_inputs(inputs)

    {:ok, output} = await(Sandbox.forward(pid, data, :importance_sampling))
    [%{"logprobs" => %{"data" => logprobs}}] = output.loss_fn_outputs

    expected =
      for {logprob, advantage} <- Enum.zip(logprobs, [1.0, -2.0, 0.5]),
          do: -:math.exp(logprob + 6.0) * advantage

    assert_in_delta output.metrics["loss:sum"], Enum.sum(expected), 1.0e-5

    # A quadratic penalty that is nothing but itself.
    config = [loss_fn_config: %{beta: 2.0}]
    {:ok, dro} = await(Sandbox.forward(pid, data, "dro", config))
    {:ok, free} = await(Sandbox.forward(pid, data, "dro", loss_fn_config: %{"beta" => 0.0}))
    penalty = for(logprob <- logprobs, do: (logprob + 6.0) ** 2) |> Enum.sum()
    assert_in_delta dro.metrics["loss:sum"] - free.metrics["loss:sum"], penalty, 1.0e-4
  end

  defp put_inputs(datum, inputs),
    do: %{datum | loss_fn_inputs: Map.merge(datum.loss_fn_inputs, inputs)}

  test "samples in the form of Tinkex's", %{pid: pid} do
    {:ok, sampler} = await(Sandbox.save_weights_and_get_sampling_client(pid))
    params = %{max_tokens: 6, seed: 1}
    {:ok, first} = await(Sandbox.sample(sampler, ~c"the cat", params, num_samples: 3))
    assert [%{tokens: tokens, logprobs: logprobs, stop_reason: :length}, _, _] = first.sequences
    assert {length(tokens), length(logprobs), first.prompt_logprobs} == {6, 6, nil}

    # What was drawn is as likely as the model says, which is asked in another way.
    {:ok, [nil | told]} = await(Sandbox.compute_logprobs(sampler, ~c"the cat" ++ tokens))

    for {a, b} <- Enum.zip(logprobs, Enum.take(told, -6)),
        do: assert_in_delta(a, b, 1.0e-4)

    prompt = %{chunks: [%{type: "encoded_text", tokens: ~c"the cat"}]}
    assert await(Sandbox.sample(sampler, prompt, params, num_samples: 3)) == {:ok, first}

    stop = [max_tokens: 200, stop: Enum.to_list(0..255), seed: 2]
    {:ok, %{sequences: [sequence]}} = await(Sandbox.sample(sampler, ~c"a", stop))
    assert sequence.stop_reason == :stop
    assert {:error, %RequestError{}} = await(Sandbox.sample(sampler, ~c"a", %{top_p: 2}))

    for {says, call} <- [
          {"no option :topk", fn -> Sandbox.sample(sampler, ~c"a", %{}, topk: 1) end},
          {"sampling parameters as a map", fn -> Sandbox.sample(sampler, ~c"a", 1) end},
          {"expected chunks", fn -> Sandbox.compute_logprobs(sampler, "a") end}
        ],
        do: assert_raise(ArgumentError, ~r/#{says}/, call)
  end

  @tag :tmp_dir
  test "goes on from what was saved, in another process and bit for bit", %{tmp_dir: dir} do
    train = fn pid ->
      {:ok, _} = await(Sandbox.forward_backward(pid, data(), :cross_entropy))
      {:ok, _} = await(Sandbox.optim_step(pid, learning_rate: 0.1))
    end

    sample = fn sampler -> await(Sandbox.sample(sampler, ~c"the", max_tokens: 9, seed: 1)) end

    pid = start!(seed: 3, state: dir)
    {:ok, sampler} = await(Sandbox.save_weights_and_get_sampling_client(pid))
    drawn = sample.(sampler)
    train.(pid)
    # A sampler keeps the weights that it was made of.
    {:ok, other} = await(Sandbox.save_weights_and_get_sampling_client(pid))
    assert {sample.(sampler), sample.(other) != drawn} == {drawn, true}
    {:ok, %{path: path}} = await(Sandbox.save_state(pid, "first"))
    assert {:error, %RequestError{}} = await(Sandbox.save_state(pid, "first"))
    assert {:ok, %{path: ^path}} = await(Sandbox.save_state(pid, "first", overwrite: true))
    train.(pid)

    other = start!(seed: 4, state: dir)
    assert {:ok, %{path: ^path}} = await(Sandbox.load_state_with_optimizer(other, path))
    train.(other)
    assert Sandbox.parameters(other) == Sandbox.parameters(pid)
    {:ok, _} = await(Sandbox.load_state(other, path))
    train.(other)
    assert Sandbox.parameters(other) != Sandbox.parameters(pid)
    assert {:error, %RequestError{} = error} = await(Sandbox.load_state(other, "tinker://x"))
    assert Exception.message(error) =~ "there is no checkpoint"
  end

  test "finds the linearized gradient equal to the one from end to end", %{pid: pid} do
    assert {:ok, check} =
             Sandbox.check_gradient(pid, data(),
               base_loss: {:nll, reduction: "token_mean", weights: nil},
               regularizers: [%{name: "l2", fn: :l2, weight: 0.1}]
             )

    assert check.max_abs_gradient > 1.0e-3
    assert check.max_abs_difference < 1.0e-6
  end

  test "is found by its name" do
    assert {:ok, _} = await(Sandbox.forward(__MODULE__.Named, data(), :cross_entropy))
  end

  describe "a mistake" do
    test "that Python finds is the task's error, and the model goes on", %{pid: pid} do
      wrong = [datum([1, 2], [3, 512], [1.0, 1.0])]

      assert {:error, %RequestError{} = error} =
               await(Sandbox.forward(pid, wrong, :cross_entropy))

      assert Exception.message(error) =~ "token 512 is outside the sandbox's vocabulary"
      assert {:error, %RequestError{}} = await(Sandbox.optim_step(pid, %{beta1: 1.0}))
      assert {:error, error} = await(Sandbox.forward(pid, data(), :mse))
      assert Exception.message(error) =~ "not 'mse'"
      assert {:error, error} = await(Sandbox.forward_backward(pid, data(), :ppo))
      assert Exception.message(error) =~ "ppo needs logprobs"
      assert {:error, error} = await(Sandbox.optim_step(pid, %{momentum: 0.9}))
      assert Exception.message(error) =~ "unknown parameter 'momentum' of AdamW"
      assert {:ok, _} = await(Sandbox.forward(pid, data(), :cross_entropy))
    end

    test "that Elixir finds raises", %{pid: pid} do
      for {says, call} <- [
            {"name of a loss, such as :ppo", fn -> Sandbox.forward(pid, data(), 3) end},
            {"loss_fn_config as a map",
             fn ->
               Sandbox.forward(pid, data(), :ppo, loss_fn_config: 1)
             end},
            {"name as a string", fn -> Sandbox.save_state(pid, :first) end},
            {"list of datums", fn -> Sandbox.forward(pid, [], :cross_entropy) end},
            {"keyword list", fn -> Sandbox.forward(pid, data(), :cross_entropy, %{}) end},
            {"at `adam_params.eps`", fn -> Sandbox.optim_step(pid, eps: self()) end},
            {"AdamW as a map", fn -> Sandbox.optim_step(pid, 0.1) end},
            {"nothing to compute", fn -> Sandbox.check_gradient(pid, data(), []) end},
            {"has no option :workers", fn -> Sandbox.start_link(workers: 2) end},
            {"expected an integer", fn -> Sandbox.start_link(seed: "x") end}
          ] do
        assert_raise ArgumentError, ~r/#{Regex.escape(says)}/, call
      end
    end

    test "at the start is start_link's error" do
      Process.flag(:trap_exit, true)
      assert {:error, %WorkerError{} = error} = Sandbox.start_link(python: "no/such/python")
      assert Exception.message(error) =~ "there is no Python at no/such/python"
      assert {:error, %WorkerError{} = error} = Sandbox.start_link(load: ["no_such_module"])
      assert Exception.message(error) =~ "no_such_module"
      assert {:error, %WorkerError{} = error} = Sandbox.start_link(seed: 2 ** 63)
      assert Exception.message(error) =~ "integer of 64 bits"
    end
  end

  test "a sandbox that is not there is the task's error" do
    assert {:error, %WorkerError{} = error} =
             await(Sandbox.forward(Nobody, data(), :cross_entropy))

    assert Exception.message(error) =~ "no sandbox runs as Nobody"
  end

  test "a process that ends is the error of every task that waits" do
    pid = start!()
    os_pid = os_pid(pid)
    # Stopped, it answers nothing that it is asked until it is killed.
    System.cmd("kill", ["-STOP", "#{os_pid}"])
    {:ok, first} = Sandbox.forward(pid, data(), :cross_entropy)
    {:ok, second} = Sandbox.optim_step(pid, %{})
    System.cmd("kill", ["-KILL", "#{os_pid}"])

    for task <- [first, second] do
      assert {:error, %WorkerError{reason: {:exited, 137}}} = Task.await(task, 60_000)
    end
  end

  test "the Python process ends with its owner" do
    pid = start!()
    os_pid = os_pid(pid)
    GenServer.stop(pid)
    eventually(fn -> not alive?(os_pid) end)
  end
end
