# GRPO from end to end on this machine, from Elixir: the server's own loss, with regularizers added.
#
#     mix run docs/examples/grpo.exs [STEPS]
#
# or `make demo-rl-elixir`, which Ctrl-C ends.
#
# The model that is trained is sampled; a reward that a program can check asks for small letters.
# Tinker's importance_sampling is the loss, by name. Three regularizers ride along: the KL to the
# start, the entropy, and a reward model behind HTTP, which the BEAM serves and an async term in
# Python asks. Half-way the run is saved; another sandbox, in another process, goes on from there and
# must come to the very same parameters.
#
# Exits with 1 if the reward does not rise, the KL leaves its bounds, or the resumed run differs.

defmodule RewardModel do
  # A model of what people like, which is far away: here, that no letter is said twice, in either case.

  def start_link do
    {:ok, socket} =
      :gen_tcp.listen(0, [:binary, packet: :http_bin, active: false, ip: {127, 0, 0, 1}])

    {:ok, port} = :inet.port(socket)
    {:ok, _} = Task.start_link(fn -> serve(socket) end)
    "http://127.0.0.1:#{port}/"
  end

  # JSON of numbers is Elixir's own form of them.
  defp serve(socket) do
    {:ok, connection} = :gen_tcp.accept(socket)

    texts =
      connection |> body(0) |> then(&Regex.scan(~r/\[([\d, ]+)\]/, &1, capture: :all_but_first))

    scores = for [text] <- texts, do: text |> String.split(", ") |> dullness()
    answer = inspect(scores, limit: :infinity)
    head = "HTTP/1.1 200 OK\r\ncontent-length: #{byte_size(answer)}\r\nconnection: close\r\n\r\n"
    :ok = :gen_tcp.send(connection, [head, answer])
    :gen_tcp.close(connection)
    serve(socket)
  end

  defp body(connection, length) do
    case :gen_tcp.recv(connection, 0) do
      {:ok, {:http_header, _, :"Content-Length", _, length}} ->
        body(connection, String.to_integer(length))

      {:ok, :http_eoh} ->
        :inet.setopts(connection, packet: :raw)
        {:ok, body} = :gen_tcp.recv(connection, length)
        body

      {:ok, _other} ->
        body(connection, length)
    end
  end

  defp dullness(tokens) do
    letters = Enum.uniq_by(tokens, &rem(String.to_integer(&1), 32))
    1 - length(letters) / length(tokens)
  end
end

defmodule Grpo do
  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Live, Sandbox}

  @prompt ~c"Sing: "
  # Of the targets, those that are prompt.
  @before length(@prompt) - 1
  @length 12
  @group 16
  # Nats a sequence, by k2.
  @kl_bound 60.0

  def run(argv) do
    steps = argv |> List.first("60") |> String.to_integer()
    half = div(steps, 2)
    state = Path.join(System.tmp_dir!(), "grpo-#{System.pid()}")
    url = RewardModel.start_link()

    {:ok, _} = System.trap_signal(:sighup, fn -> interrupted(state) end)
    children = [{CustomLoss, name: Grpo.Loss, load: [Path.join(__DIR__, "grpo_terms.py")]}]
    {:ok, _} = Supervisor.start_link(children, strategy: :one_for_one)
    {:ok, model} = Sandbox.start_link(seed: 0, state: state)
    start = await(Sandbox.save_weights_and_get_sampling_client(model))
    step = fn model, number -> step(model, number, start, regularizers(url)) end

    show = fn number, live ->
      metrics = step.(model, number)
      {metrics, Live.put(live, metrics)}
    end

    {first, live} = Enum.map_reduce(0..(half - 1), Live.new(total: steps), show)
    %{path: checkpoint} = await(Sandbox.save_state(model, "half-way"))
    {second, live} = Enum.map_reduce(half..(steps - 1), live, show)
    Live.finish(live)

    IO.puts("\nThe second half again, in another process, resumed from the checkpoint:")
    {:ok, resumed} = Sandbox.start_link(seed: 1, state: state)
    await(Sandbox.load_state_with_optimizer(resumed, checkpoint))
    Enum.each(half..(steps - 1), &step.(resumed, &1))
    same = Sandbox.parameters(resumed) == Sandbox.parameters(model)
    File.rm_rf!(state)

    judge(first ++ second, same)
  end

  # As a program that Ctrl-C ended.
  defp interrupted(state) do
    IO.puts("\nstopped")
    File.rm_rf(state)
    System.halt(130)
  end

  # The metrics of a step: its record and, beside it, the reward. `mask` and `reference_logprobs` are
  # for the terms and are not sent.
  defp step(model, number, start, regularizers) do
    sampler = await(Sandbox.save_weights_and_get_sampling_client(model))
    params = %{max_tokens: @length, temperature: 1.0, seed: number}
    drawn = await(Sandbox.sample(sampler, @prompt, params, num_samples: @group))
    rewards = Enum.map(drawn.sequences, &reward(&1.tokens))
    data = data(drawn.sequences, rewards, start)
    options = [regularizers: regularizers, step: number]

    output =
      await(
        CustomLoss.forward_backward(
          Grpo.Loss,
          {Sandbox, model},
          data,
          :importance_sampling,
          options
        )
      )

    await(Sandbox.optim_step(model, learning_rate: 0.02))
    Map.put(output.metrics, "reward", mean(rewards))
  end

  defp regularizers(url) do
    [
      %{name: "kl", fn: :kl, weight: 0.03},
      %{name: "entropy", fn: :entropy, weight: 0.002},
      %{name: "dull", fn: "grpo_terms:dullness", weight: 0.01, params: %{url: url}}
    ]
  end

  # Small letters, of the @length that there may be: anyone can check it.
  defp reward(tokens), do: Enum.count(tokens, &(&1 in ?a..?z)) / @length

  defp data(sequences, rewards, start) do
    {mean, scale} = {mean(rewards), max(deviation(rewards), 1.0e-3)}

    for {sequence, reward} <- Enum.zip(sequences, rewards) do
      tokens = @prompt ++ sequence.tokens
      [_first | reference] = await(Sandbox.compute_logprobs(start, tokens))
      advantage = (reward - mean) / scale / @length

      %{
        model_input: Enum.drop(tokens, -1),
        loss_fn_inputs: %{
          "target_tokens" => tl(tokens),
          "logprobs" => column(sequence.logprobs),
          "advantages" => column(List.duplicate(advantage, length(sequence.tokens))),
          "mask" => column(List.duplicate(1.0, length(sequence.tokens))),
          "reference_logprobs" => column(Enum.drop(reference, @before))
        }
      }
    end
  end

  # What is of the text that was drawn, and nothing of the prompt.
  defp column(values), do: List.duplicate(0.0, @before) ++ values

  defp judge(seen, same) do
    rewards = Enum.map(seen, & &1["reward"])
    few = max(1, min(5, div(length(rewards), 2)))
    {first, last} = {mean(Enum.take(rewards, few)), mean(Enum.take(rewards, -few))}
    kl = seen |> Enum.map(&(&1["regularizers"]["kl"]["value"] / @group)) |> Enum.max()

    tens = rewards |> Enum.chunk_every(10) |> Enum.map_join("  ", &fixed(mean(&1)))
    IO.puts("  reward, ten steps at a time: #{tens}")

    checks = [
      {"the reward rises: #{fixed(first)} to #{fixed(last)}, in the mean of #{few} steps",
       last > first},
      {"the KL stays below #{@kl_bound} nats a sequence: #{fixed(kl)}", kl < @kl_bound},
      {"the resumed run has the same parameters, bit for bit", same}
    ]

    for {sentence, held} <- checks,
        do: IO.puts("#{if held, do: "  yes", else: "  NO "}  #{sentence}")

    if Enum.all?(checks, &elem(&1, 1)), do: 0, else: 1
  end

  defp await({:ok, task}) do
    {:ok, result} = Task.await(task, :infinity)
    result
  end

  defp mean(values), do: Enum.sum(values) / length(values)

  defp deviation(values) do
    mean = mean(values)
    values |> Enum.map(&((&1 - mean) ** 2)) |> mean() |> :math.sqrt()
  end

  defp fixed(number), do: :erlang.float_to_binary(number / 1, decimals: 3)
end

System.halt(Grpo.run(System.argv()))
