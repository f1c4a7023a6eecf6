defmodule Tinkex.CustomLoss.Live.Follower do
  @moduledoc false
  # Draws what a pool computes. Whoever computes sends the record, and does no more.
  use GenServer

  alias Tinkex.CustomLoss.{Live, Telemetry}

  @stop [:tinkex_custom_loss, :compute, :stop]

  @impl true
  def init({pool, opts}) do
    # To end the table, and the handler, however this ends.
    Process.flag(:trap_exit, true)
    id = {__MODULE__, self()}
    config = %{pool: pool, to: self()}
    :ok = Telemetry.attach(id, [@stop], &__MODULE__.handle_event/4, config)
    {:ok, %{id: id, live: Live.new(opts)}}
  end

  def handle_event(@stop, _measurements, %{pool: pool, record: %{} = record}, %{pool: pool} = to),
    do: send(to.to, {:record, record})

  def handle_event(@stop, _measurements, _metadata, _config), do: :ok

  @impl true
  def handle_info({:record, record}, state),
    do: {:noreply, %{state | live: Live.put(state.live, record)}}

  # A stray message.
  def handle_info(_message, state), do: {:noreply, state}

  @impl true
  def terminate(_reason, %{id: id, live: live}) do
    Telemetry.detach(id)
    Live.finish(live)
  end
end
