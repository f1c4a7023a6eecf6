defmodule Tinkex.CustomLoss.TinkexTest do
  # With TINKEX_PATH these tests run against the real Tinkex, over HTTP to a sandbox; without it
  # against stand-ins of its shapes. Those that have the tag :tinkex need the real one.
  use ExUnit.Case, async: false

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.Test
  alias Tinkex.CustomLoss.Test.SandboxServer
  alias Tinkex.Types.{AdamParams, Datum, ModelInput, TensorData}

  @real Code.ensure_loaded?(Tinkex.TrainingClient)

  # As in fixtures/sandbox.py.
  @texts [
    "to be or not to be, that is the question",
    "whether 'tis nobler in the mind to suffer",
    "the slings and arrows of outrageous fortune"
  ]
  @loss [
    base_loss: :nll,
    regularizers: [
      %{name: "l2", fn: :l2, weight: 0.02},
      %{name: "smoothness", fn: "demo_terms:smoothness", weight: 0.5},
      %{name: "rarity", fn: "demo_terms:rarity", weight: 2.0}
    ]
  ]

  setup_all do
    load = [Path.expand("../../docs/examples/demo_terms.py", __DIR__), fixture("tinkex_terms.py")]
    pool = start_pool!(load: load, await_ready: true)
    if @real, do: Map.put(SandboxServer.start!(), :pool, pool), else: %{pool: pool}
  end

  defp service!(url) do
    config = apply(Tinkex.Config, :new, [[base_url: url, api_key: "tml-sandbox"]])
    {:ok, service} = apply(Tinkex.ServiceClient, :start_link, [[config: config]])
    service
  end

  defp client!(%{url: url}) do
    {:ok, client} =
      apply(Tinkex.ServiceClient, :create_lora_training_client, [
        service!(url),
        "sandbox",
        [call_timeout: 60_000]
      ])

    {Tinkex.TrainingClient, client}
  end

  defp client!(_context) do
    {:ok, client} = Test.TrainingClient.start_link()
    {Test.TrainingClient, client}
  end

  defp data(texts \\ @texts), do: Enum.map(texts, &datum(String.to_charlist(&1)))

  defp datum(tokens, inputs \\ %{}) do
    targets = tl(tokens)
    weights = List.duplicate(1.0, length(targets))

    %Datum{
      model_input: ModelInput.from_ints(Enum.drop(tokens, -1)),
      loss_fn_inputs:
        Map.merge(
          %{
            "target_tokens" => %TensorData{data: targets, dtype: :int64, shape: [length(targets)]},
            "weights" => %TensorData{data: weights, dtype: :float32, shape: nil}
          },
          inputs
        )
    }
  end

  # The two ways of a step.
  defp ours(pool, client, data, opts) do
    client = if @real, do: elem(client, 1), else: client
    await(CustomLoss.forward_backward_custom(pool, client, data, opts))
  end

  defp theirs(pool, {module, client}, data, opts) do
    loss_fn = CustomLoss.loss_fn(pool, opts)
    await(apply(module, :forward_backward_custom, [client, data, loss_fn]))
  end

  defp optim_step({module, client}) do
    params = struct!(AdamParams, learning_rate: 0.01)
    {:ok, _} = await(apply(module, :optim_step, [client, params]))
  end

  defp await({:ok, task}), do: Task.await(task, 30_000)

  defp logprobs({module, client}, data) do
    {:ok, output} = await(apply(module, :forward, [client, data, :cross_entropy, []]))
    for %{"logprobs" => %{"data" => values}} <- output.loss_fn_outputs, do: values
  end

  for way <- [:ours, :theirs] do
    test "#{way}: every step lowers the loss, and says what each term did", context do
      client = client!(context)

      losses =
        for step <- 1..4 do
          {:ok, output} = unquote(way)(context.pool, client, data(), [step: step] ++ @loss)
          optim_step(client)

          metrics = output.metrics
          assert metrics["loss:sum"] == metrics["loss_total"]
          assert metrics["schedule_step"] == step
          assert %{"l2" => l2, "smoothness" => _, "rarity" => _} = metrics["regularizers"]
          assert_in_delta l2["contribution"], 0.02 * l2["value"], 1.0e-9
          metrics["loss:sum"]
        end

      assert losses == Enum.sort(losses, :desc)
      assert length(Enum.uniq(losses)) == 4
    end

    test "#{way}: a term that fails costs its step alone", context do
      client = client!(context)
      before = logprobs(client, data())
      failing = [base_loss: "tinkex_terms:raises"]

      assert {:error, error} = unquote(way)(context.pool, client, data(), failing)
      assert %CustomLoss.TermError{term: "base_loss", type: "ValueError"} = our_error(error)

      # Nothing that Tinkex reserved is missing, and nothing was trained.
      optim_step(client)
      assert logprobs(client, data()) == before

      assert {:ok, output} = unquote(way)(context.pool, client, data(), @loss)
      assert output.metrics["loss:sum"] > 0
    end

    test "#{way}: a gradient that is not finite is refused", context do
      client = client!(context)
      failing = [base_loss: "tinkex_terms:nan_gradient"]
      assert {:error, error} = unquote(way)(context.pool, client, data(), failing)
      assert Exception.message(our_error(error)) =~ ~r/gradient of the term "base_loss" is nan/
      assert {:ok, _output} = unquote(way)(context.pool, client, data(), @loss)
    end

    test "#{way}: a loss of several tokens a position", context do
      client = client!(context)

      targets = %TensorData{data: Enum.to_list(1..12), dtype: :int64, shape: [4, 3]}
      weights = %TensorData{data: List.duplicate(1.0, 12), dtype: :float32, shape: [4, 3]}
      inputs = %{"target_tokens" => targets, "weights" => weights}
      data = [datum([5, 6, 7, 8, 9], inputs), datum([5, 6, 7])]

      assert {:ok, output} = unquote(way)(context.pool, client, data, base_loss: :l2)
      assert output.metrics["logprob_count"] == 14
      optim_step(client)
      assert {:ok, after_step} = unquote(way)(context.pool, client, data, base_loss: :l2)
      assert after_step.metrics["loss:sum"] < output.metrics["loss:sum"]
    end

    test "#{way}: more datums than Tinkex sends at a time", context do
      client = client!(context)
      data = for i <- 1..1030, do: datum([rem(i, 250), rem(i, 200), 3])
      assert {:ok, output} = unquote(way)(context.pool, client, data, base_loss: :nll)
      assert output.metrics["datum_count"] == 1030
      optim_step(client)
    end

    test "#{way}: the pool that is not there costs the step alone", context do
      client = client!(context)
      assert {:error, error} = unquote(way)(:no_such_pool, client, data(), @loss)
      assert %CustomLoss.WorkerError{reason: :not_running} = our_error(error)
      assert {:ok, _output} = unquote(way)(context.pool, client, data(), @loss)
    end
  end

  # Tinkex wraps what a loss raised.
  defp our_error(%{__struct__: Tinkex.Error, data: %{exception: error}}), do: error
  defp our_error(error), do: error

  test "both ways train alike", context do
    [first, second] = for _ <- 1..2, do: client!(context)

    for step <- 1..3 do
      {:ok, _} = ours(context.pool, first, data(), [step: step] ++ @loss)
      {:ok, _} = theirs(context.pool, second, data(), [step: step] ++ @loss)
      optim_step(first)
      optim_step(second)
    end

    assert logprobs(first, data()) == logprobs(second, data())
  end

  test "what the server computed has a name of its own", context do
    {:ok, output} = ours(context.pool, client!(context), data(), base_loss: :l2)
    # Σ -logprob · weight with weight = -2 · logprob
    assert_in_delta output.metrics["surrogate_loss:sum"], 2 * output.metrics["loss:sum"], 1.0e-2
  end

  test "terms see every kind of model input", %{pool: pool} do
    bytes = <<137, 80, 78, 71>>
    image = %{data: Base.encode64(bytes), format: :png, expected_tokens: 3}
    pointer = %{location: "tinker://image", format: :jpeg, expected_tokens: 4}

    chunks = [
      %Tinkex.Types.EncodedTextChunk{tokens: [1, 2]},
      struct!(Tinkex.Types.ImageChunk, image),
      struct!(Tinkex.Types.ImageAssetPointerChunk, pointer)
    ]

    mixed = %Datum{model_input: %ModelInput{chunks: chunks}, loss_fn_inputs: %{}}
    # As it comes from JSON.
    text = %{"model_input" => %{"chunks" => [%{"type" => "encoded_text", "tokens" => [1, 2, 3]}]}}

    assert {:ok, output} =
             CustomLoss.compute(pool, [mixed, text], [[-1.0], [-2.0]],
               base_loss: "tinkex_terms:looks_at_chunks"
             )

    assert output.record["base_loss"]["custom"] ==
             %{"length_0" => 9.0, "length_1" => 3.0, "chunks" => 4.0, "image_bytes" => 4.0}
  end

  test "inputs may be integers or floats, without a shape, or decoded from JSON", %{pool: pool} do
    json = %{
      "model_input" => %{"chunks" => []},
      "loss_fn_inputs" => %{
        "mask" => %{"data" => [1, 0], "dtype" => "int64", "shape" => [2]},
        "scale" => %{"data" => [0.5, 2], "dtype" => "float32"}
      }
    }

    struct = %Datum{
      model_input: %ModelInput{chunks: []},
      loss_fn_inputs: %{
        "mask" => %TensorData{data: [0, 1], dtype: :int64, shape: nil},
        "scale" => %TensorData{data: [1.0, 3.0], dtype: :float32, shape: [2]}
      }
    }

    logprobs = [
      %{"logprobs" => %{"data" => [-1, -2], "dtype" => "float32", "shape" => [2]}},
      %TensorData{data: [-3.0, -4.0], dtype: :float32, shape: nil}
    ]

    assert {:ok, output} =
             CustomLoss.compute(pool, [json, struct], logprobs, base_loss: "tinkex_terms:masked")

    # Σ mask · scale · logprob
    assert output.loss_total == 0.5 * -1 + 3.0 * -4

    assert [%{"logprobs" => %{"data" => [0.5, +0.0]}}, %TensorData{data: [+0.0, 3.0]}] =
             output.gradients
  end

  test "a loss function for grad alone is told what it lacks", %{pool: pool} do
    loss_fn = CustomLoss.loss_fn(pool, base_loss: :l2)
    tensor = apply(Nx, :from_binary, [<<-1.0::float-32-little>>, {:f, 32}])

    assert_raise ArgumentError, ~r/before it was called with tensors/, fn ->
      apply(Nx.Defn, :grad, [{tensor}, fn {x} -> elem(loss_fn.([], [x]), 0) end])
    end
  end

  test "options of a loss function are checked when it is made", %{pool: pool} do
    assert_raise ArgumentError, ~r/there is nothing to compute/, fn ->
      CustomLoss.loss_fn(pool, [])
    end

    assert_raise ArgumentError, ~r/loss_fn\/2 has no option :client_opts/, fn ->
      CustomLoss.loss_fn(pool, base_loss: :l2, client_opts: [])
    end

    assert_raise ArgumentError, ~r/loss_fn\/2 trains on the gradient/, fn ->
      CustomLoss.loss_fn(pool, base_loss: :l2, gradients: false)
    end
  end

  # -1.5 and -2, and twice that, in each type.
  @nx [
    {{:f, 32}, <<-1.5::float-32-little, -2::float-32-little>>,
     <<-3::float-32-little, -4::float-32-little>>},
    {{:f, 64}, <<-1.5::float-64-little, -2::float-64-little>>,
     <<-3::float-64-little, -4::float-64-little>>},
    {{:f, 16}, <<-1.5::float-16-little, -2::float-16-little>>,
     <<-3::float-16-little, -4::float-16-little>>},
    {{:bf, 16}, <<0xBFC0::16-little, 0xC000::16-little>>,
     <<0xC040::16-little, 0xC080::16-little>>}
  ]

  test "Nx tensors of every type of float come back as such", %{pool: pool} do
    for {type, bytes, twice} <- @nx do
      tensor = apply(Nx, :reshape, [apply(Nx, :from_binary, [bytes, type]), {1, 2}])
      assert {:ok, output} = CustomLoss.compute(pool, nil, [tensor], base_loss: :l2)
      assert [gradient] = output.gradients
      assert apply(Nx, :type, [gradient]) == type
      assert apply(Nx, :shape, [gradient]) == {1, 2}
      assert apply(Nx, :to_binary, [gradient]) == twice
    end
  end

  @tag :tinkex
  test "Tinkex's logger of regularizers understands our events", %{pool: pool} do
    id = apply(Tinkex.Regularizer.Telemetry, :attach_logger, [[level: :warning]])

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        for regularizer <- [
              %{name: "l2", fn: :l2, weight: 0.5},
              %{name: "fails", fn: "tinkex_terms:raises", weight: 1.0, on_error: :skip},
              %{name: "nan", fn: "tinkex_terms:nan_loss", weight: 1.0, on_non_finite: :zero}
            ] do
          opts = [base_loss: :nll, regularizers: [regularizer]]
          {:ok, _} = CustomLoss.compute(pool, data(["abc"]), [[-1.0, -2.0]], opts)
        end

        {:error, _} = CustomLoss.compute(pool, nil, [[-1.0]], base_loss: "tinkex_terms:raises")
      end)

    # A handler that raises is detached.
    assert apply(Tinkex.Regularizer.Telemetry, :detach, [id]) == :ok
    assert log =~ "Custom loss starting: regularizers=1 track_grad_norms=true"
    assert log =~ "Regularizer l2 value=5.0 contribution=2.5"
    assert log =~ "Regularizer fails failed"
    assert log =~ "Regularizer nan failed"
    assert log =~ "Custom loss failed"
  end

  @tag :tinkex
  test "our own logger", %{pool: pool} do
    id = CustomLoss.Telemetry.attach_logger()

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        opts = [regularizers: [%{name: "l2", fn: :l2, weight: 0.5}]]
        {:ok, _} = CustomLoss.compute(pool, nil, [[-1.0, -2.0]], opts)
        {:error, _} = CustomLoss.compute(pool, nil, [[-1.0]], base_loss: "tinkex_terms:raises")
      end)

    assert CustomLoss.Telemetry.detach(id) == :ok
    assert log =~ ~s(regularizer "l2": value 5.0, weight 0.5, contribution 2.5)
    assert log =~ "loss 2.5, of which 1 regularizers contribute 2.5"
    assert log =~ ~r/\[warning\] Tinkex.CustomLoss #PID<.*>: no loss after/
  end

  # The losses of the service, and the terms of the catalogue that are the same.
  @native [
    {:cross_entropy, nil, :nll, %{}},
    {:importance_sampling, nil, :importance_sampling, %{}},
    {:ppo, %{"clip_low_threshold" => 0.9}, :ppo, %{clip_low: 0.1}},
    {:cispo, %{"clip_high_threshold" => 1.05}, :cispo, %{low: 0.0, high: 1.05}},
    {:dro, %{"beta" => 0.5}, :dro, %{beta: 0.5}}
  ]

  # The datums of a policy loss: of cross_entropy with the weights that it reads.
  defp native_data(client, loss_fn) do
    for {datum, logprobs} <- Enum.zip(data(), logprobs(client, data())) do
      wave = for i <- 1..length(logprobs), do: :math.sin(i)
      tensor = &%TensorData{data: &1, dtype: :float32, shape: [length(&1)]}
      old = tensor.(Enum.zip_with(logprobs, wave, &(&1 + 0.2 * &2)))

      policy = %{
        "logprobs" => old,
        "advantages" => tensor.(Enum.map(wave, &(0.3 - &1))),
        "reference_logprobs" => old
      }

      inputs = Map.merge(datum.loss_fn_inputs, policy)
      inputs = if loss_fn == :cross_entropy, do: inputs, else: Map.delete(inputs, "weights")
      %{datum | loss_fn_inputs: inputs}
    end
  end

  @regularizers [
    %{name: "kl", fn: :kl, weight: 0.3},
    %{name: "smoothness", fn: "demo_terms:smoothness", weight: 0.5}
  ]

  defp native(pool, {_module, client}, data, loss_fn, config \\ nil) do
    client_opts = if config, do: [loss_fn_config: config], else: []
    opts = [regularizers: @regularizers, client_opts: client_opts]
    await(CustomLoss.forward_backward(pool, client, data, loss_fn, opts))
  end

  @tag :tinkex
  test "the server's own losses with regularizers have the gradient of the whole, without a forward",
       %{pool: pool} = context do
    context = Map.merge(context, SandboxServer.start!())
    me = self()

    sent = fn _event, _measurements, %{path: path}, _config -> send(me, {:sent, path}) end
    start = [[:tinkex, :http, :request, :start]]

    for {loss_fn, config, term, params} <- @native do
      [one, other] = for _ <- 1..2, do: client!(context)
      data = native_data(one, loss_fn)
      base = %{fn: term, params: params, reduction: :token_sum}
      {:ok, whole} = ours(pool, one, data, base_loss: base, regularizers: @regularizers)

      stop = handle_telemetry(start, sent)
      {:ok, output} = native(pool, other, data, loss_fn, config)
      stop.()

      assert [difference] = SandboxServer.figures(context.sandbox, "gradients")
      assert difference < 1.0e-6
      assert_in_delta output.metrics["loss_total"], whole.metrics["loss_total"], 1.0e-3

      paths = received([])
      assert Enum.count(paths, &(&1 =~ ~r{/forward_backward$})) == 2
      refute Enum.any?(paths, &(&1 =~ ~r{/forward$}))
    end
  end

  defp received(paths) do
    receive do
      {:sent, path} -> received([path | paths])
    after
      0 -> paths
    end
  end

  # Tinkex itself sends again what was answered with a status, and not what a connection has lost.
  for {name, faults} <- [
        {"429", ~s({"rate_limits": 1.0, "at_most": 1})},
        {"5xx", ~s({"server_errors": 1.0, "at_most": 1})},
        {"slow futures", ~s({"slow_futures": 0.5, "slow_seconds": 0.2, "seed": 1})}
      ] do
    @tag :tinkex
    test "a step of the server's own loss survives #{name}", %{pool: pool} = context do
      data = native_data(client!(context), :ppo)
      context = Map.merge(context, SandboxServer.start!(unquote(faults)))
      [one, other] = for _ <- 1..2, do: client!(context)

      for client <- [one, other] do
        assert {:ok, output} = native(pool, client, data, :ppo)
        assert output.metrics["regularizers"]["kl"]["value"] > 0
      end

      # The one that was struck, and the one that was not.
      assert [+0.0] = SandboxServer.figures(context.sandbox, "gradients")
    end
  end

  for {name, faults, expected} <- [
        {"429 without end", ~s({"rate_limits": 1.0}),
         quote(do: %{type: :api_status, status: 429})},
        {"a lost request", ~s({"lost_requests": 1.0, "at_most": 1}),
         quote(do: %{type: :api_connection})}
      ] do
    @tag :tinkex
    test "#{name} is Tinkex's error, and nothing is trained",
         %{pool: pool} = context do
      data = native_data(client!(context), :ppo)
      context = Map.merge(context, SandboxServer.start!(unquote(faults)))
      client = client!(context)
      assert {:error, %{__struct__: Tinkex.Error} = error} = native(pool, client, data, :ppo)
      assert unquote(expected) = error
      assert SandboxServer.figures(context.sandbox, "norms") == [0.0]
    end
  end

  @tag :tinkex
  test "a NaN among the server's logprobs is Tinkex's error, since JSON has none", context do
    data = native_data(client!(context), :ppo)
    faults = ~s({"nan_logprobs": 1.0, "at_most": 1})
    client = context |> Map.merge(SandboxServer.start!(faults)) |> client!()

    assert {:error, %{__struct__: Tinkex.Error} = error} =
             native(context.pool, client, data, :ppo)

    assert error.message =~ "NaN"
    assert {:ok, _output} = native(context.pool, client, data, :ppo)
  end

  @tag :tinkex
  test "a loss that the server refuses is Tinkex's error", %{pool: pool} = context do
    context = Map.merge(context, SandboxServer.start!(~s({"refused_losses": ["ppo"]})))
    client = client!(context)
    data = native_data(client, :ppo)
    assert {:error, %{__struct__: Tinkex.Error} = error} = native(pool, client, data, :ppo)
    assert error.message =~ "ppo"
    assert SandboxServer.figures(context.sandbox, "norms") == [0.0]
    assert {:ok, _output} = native(pool, client, data, :dro)
  end

  # The loop of docs/examples/grpo.exs with Tinkex's clients.
  @tag :tinkex
  test "samples of the model that is trained, the server's loss on them, and a checkpoint",
       %{pool: pool} = context do
    service = service!(context.url)
    client = client!(context)
    prompt = ~c"Sing: "
    params = struct!(Tinkex.Types.SamplingParams, max_tokens: 8, seed: 1)
    tensor = &%TensorData{data: &1, dtype: &2, shape: [length(&1)]}

    for step <- 1..3 do
      {:ok, %{"path" => path}} = training(client, :save_weights_for_sampler, ["step-#{step}"])
      # Not by the training client, which would take a number that it does not send.
      make = [service, [model_path: path]]
      {:ok, sampler} = apply(Tinkex.ServiceClient, :create_sampling_client, make)
      input = ModelInput.from_ints(prompt)
      sample = [sampler, input, params, [num_samples: 4]]
      {:ok, drawn} = await(apply(Tinkex.SamplingClient, :sample, sample))
      assert length(drawn.sequences) == 4

      data =
        for %{tokens: tokens, logprobs: logprobs} <- drawn.sequences do
          whole = ModelInput.from_ints(prompt ++ tokens)
          logprobs_of = apply(Tinkex.SamplingClient, :compute_logprobs, [sampler, whole])
          {:ok, [nil | told]} = await(logprobs_of)
          # The sampler says of its own text what it drew it with.
          for {a, b} <- Enum.zip(Enum.drop(told, 5), logprobs), do: assert_in_delta(a, b, 1.0e-4)
          zeros = List.duplicate(0.0, length(prompt) - 1)
          advantages = for token <- tokens, do: if(token in ~c"aeiou", do: 1.0, else: -0.1)

          %Datum{
            model_input: ModelInput.from_ints(prompt ++ Enum.drop(tokens, -1)),
            loss_fn_inputs: %{
              "target_tokens" => tensor.(tl(prompt) ++ tokens, :int64),
              "logprobs" => tensor.(zeros ++ logprobs, :float32),
              "advantages" => tensor.(zeros ++ advantages, :float32),
              "reference_logprobs" => tensor.(told, :float32),
              "mask" => tensor.(zeros ++ Enum.map(tokens, fn _ -> 1.0 end), :float32)
            }
          }
        end

      opts = [regularizers: [%{name: "kl", fn: :kl, weight: 0.1}], step: step]
      step = CustomLoss.forward_backward(pool, elem(client, 1), data, :importance_sampling, opts)
      assert {:ok, output} = await(step)
      # ρ is 1, and the reference is the model itself.
      assert_in_delta output.metrics["regularizers"]["kl"]["value"], 0.0, 1.0e-6

      optim_step(client)
    end

    before = logprobs(client, data())
    {:ok, %{path: path}} = training(client, :save_state, ["after-three"])
    {:ok, _} = ours(pool, client, data(), @loss)
    optim_step(client)
    assert logprobs(client, data()) != before
    {:ok, _} = training(client, :load_state_with_optimizer, [path])
    assert logprobs(client, data()) == before
  end

  defp training({module, client}, function, args),
    do: await(apply(module, function, [client | args]))

  @tag :tinkex
  test "20 steps end where the Python SDK ends, both ways", %{pool: pool} = context do
    # A sandbox of its own, so that these are its models.
    context = Map.merge(context, SandboxServer.start!())
    python = SandboxServer.figures(context.sandbox, "train 20")

    [ours, theirs] =
      for way <- [&ours/4, &theirs/4] do
        client = client!(context)

        for step <- 0..19 do
          {:ok, output} = way.(pool, client, data(), [step: step] ++ @loss)
          optim_step(client)
          output.metrics["loss:sum"]
        end
      end

    differences = SandboxServer.figures(context.sandbox, "compare")
    assert length(differences) == 2
    assert Enum.max(differences) < 1.0e-5
    assert List.last(python) < 0.7 * hd(python)

    for {a, b, c} <- Enum.zip([python, ours, theirs]) do
      assert_in_delta a, b, 1.0e-5 * a
      assert_in_delta a, c, 1.0e-5 * a
    end

    if System.get_env("VERBOSE") do
      IO.puts(
        "losses #{hd(ours)} -> #{List.last(ours)}, parameters differ by #{inspect(differences)}"
      )
    end
  end
end
